// The names by which Python knows the plan's choices: each once, for both directions.
#pragma once

#include <stdexcept>
#include <string>

#include "plan.h"

namespace batchnorm_cuda {

template <typename T>
struct Named {
  const char* name;
  T value;
};

constexpr Named<Op> kOps[] = {{"forward_training", Op::kForwardTraining},
                              {"forward_eval", Op::kForwardEval},
                              {"backward_training", Op::kBackwardTraining},
                              {"backward_eval", Op::kBackwardEval},
                              {"double_backward_training", Op::kDoubleBackwardTraining},
                              {"double_backward_eval", Op::kDoubleBackwardEval}};
constexpr Named<Dtype> kDtypes[] = {{"float16", Dtype::kHalf},
                                    {"bfloat16", Dtype::kBFloat16},
                                    {"float32", Dtype::kFloat},
                                    {"float64", Dtype::kDouble}};
constexpr Named<Strategy> kStrategies[] = {
    {"auto", Strategy::kAuto}, {"two_pass", Strategy::kTwoPass}, {"team", Strategy::kTeam}};
constexpr Named<Scope> kScopes[] = {{"auto", Scope::kAuto},
                                    {"block", Scope::kBlock},
                                    {"cluster", Scope::kCluster},
                                    {"grid", Scope::kGrid}};
constexpr Named<Pattern> kPatterns[] = {{"along_s", Pattern::kAlongS},
                                        {"along_c", Pattern::kAlongC},
                                        {"along_row", Pattern::kAlongRow}};

template <typename T, size_t kCount>
const char* name_of(const Named<T> (&names)[kCount], T value, const char* otherwise = "unknown") {
  for (const Named<T>& each : names) {
    if (each.value == value) return each.name;
  }
  return otherwise;
}

// Null where there is no such name.
template <typename T, size_t kCount>
const T* find_value(const Named<T> (&names)[kCount], const std::string& text) {
  for (const Named<T>& each : names) {
    if (text == each.name) return &each.value;
  }
  return nullptr;
}

// `expected` lists the names for the std::invalid_argument of another text.
template <typename T, size_t kCount>
T value_of(const Named<T> (&names)[kCount], const char* what, const std::string& text,
           const char* expected) {
  if (const T* value = find_value(names, text)) return *value;
  throw std::invalid_argument(std::string("make_plan: expected ") + what + " to be " + expected +
                              ", got " + text);
}

}  // namespace batchnorm_cuda
