// Values with names, in an order: what stands between the plan's structs and Python's dictionaries.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace batchnorm_cuda {

struct NamedValue;
using NamedValues = std::vector<NamedValue>;
using Value = std::variant<bool, int64_t, double, std::string, NamedValues>;

struct NamedValue {
  std::string name;
  Value value;
};

// Out of line for each kind of value, because they are called a hundred times.
void put(NamedValues& to, const char* name, bool value);
void put(NamedValues& to, const char* name, int64_t value);
void put(NamedValues& to, const char* name, int value);
void put(NamedValues& to, const char* name, double value);
void put(NamedValues& to, const char* name, const std::string& value);
void put(NamedValues& to, const char* name, const char* value);
void put(NamedValues& to, const char* name, const NamedValues& value);

// Takes the value of that name, if there is one, out of `left` and into `value`. A value of another
// type is a std::invalid_argument; a number is taken for any type that holds it as well.
void take(NamedValues& left, const char* name, bool& value);
void take(NamedValues& left, const char* name, int& value);
void take(NamedValues& left, const char* name, int64_t& value);
void take(NamedValues& left, const char* name, double& value);
void take(NamedValues& left, const char* name, std::string& value);

// What stays was misspelt: a std::invalid_argument that names it.
void check_empty(const NamedValues& left, const char* what);

}  // namespace batchnorm_cuda
