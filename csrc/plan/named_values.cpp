#include "named_values.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace batchnorm_cuda {
namespace {

// As Python writes it.
std::string repr(const Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return "'" + *text + "'";
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "True" : "False";
  if (const auto* whole = std::get_if<int64_t>(&value)) return std::to_string(*whole);
  if (std::holds_alternative<NamedValues>(value)) return "{...}";
  const double number = std::get<double>(value);
  char digits[32];
  int precision = 1;
  do {
    std::snprintf(digits, sizeof(digits), "%.*g", precision, number);
  } while (std::strtod(digits, nullptr) != number && ++precision <= 17);
  const std::string result = digits;
  return result.find_first_not_of("-0123456789") == std::string::npos ? result + ".0" : result;
}

// A value for a field of type T: one of that type, or a number that T holds as well.
template <typename T>
T cast(const NamedValue& from) {
  if constexpr (std::is_same_v<T, std::string>) {
    if (const auto* text = std::get_if<std::string>(&from.value)) return *text;
  } else {
    if (const auto* flag = std::get_if<bool>(&from.value)) return static_cast<T>(*flag);
    const auto* whole = std::get_if<int64_t>(&from.value);
    if (whole && static_cast<int64_t>(static_cast<T>(*whole)) == *whole) {
      return static_cast<T>(*whole);
    }
  }
  if constexpr (std::is_same_v<T, double>) {
    if (const auto* number = std::get_if<double>(&from.value)) return *number;
  }
  const char* expected = std::is_same_v<T, std::string> ? "a str"
                         : std::is_same_v<T, double>    ? "a float"
                         : std::is_same_v<T, bool>      ? "a bool"
                         : sizeof(T) == 4               ? "an int of 32 bits"
                                                        : "an int";
  throw std::invalid_argument("make_plan: expected " + from.name + " to be " + expected + ", got " +
                              repr(from.value));
}

template <typename T>
void take_as(NamedValues& left, const char* name, T& value) {
  const auto found = std::find_if(left.begin(), left.end(),
                                  [&](const NamedValue& each) { return each.name == name; });
  if (found == left.end()) return;
  value = cast<T>(*found);
  left.erase(found);
}

}  // namespace

void put(NamedValues& to, const char* name, bool value) { to.push_back({name, value}); }
void put(NamedValues& to, const char* name, int64_t value) { to.push_back({name, value}); }
void put(NamedValues& to, const char* name, int value) { put(to, name, int64_t{value}); }
void put(NamedValues& to, const char* name, double value) { to.push_back({name, value}); }
void put(NamedValues& to, const char* name, const std::string& value) {
  to.push_back({name, value});
}
void put(NamedValues& to, const char* name, const char* value) {
  to.push_back({name, std::string(value)});
}
void put(NamedValues& to, const char* name, const NamedValues& value) {
  to.push_back({name, value});
}

void take(NamedValues& left, const char* name, bool& value) { take_as(left, name, value); }
void take(NamedValues& left, const char* name, int& value) { take_as(left, name, value); }
void take(NamedValues& left, const char* name, int64_t& value) { take_as(left, name, value); }
void take(NamedValues& left, const char* name, double& value) { take_as(left, name, value); }
void take(NamedValues& left, const char* name, std::string& value) { take_as(left, name, value); }

void check_empty(const NamedValues& left, const char* what) {
  if (left.empty()) return;
  std::string names;
  for (const NamedValue& each : left) {
    names += (names.empty() ? "'" : ", '") + each.name + "': " + repr(each.value);
  }
  throw std::invalid_argument(std::string("make_plan: unknown ") + what + " {" + names + "}");
}

}  // namespace batchnorm_cuda
