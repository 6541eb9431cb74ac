#include "options.h"

#include <cstdlib>
#include <fstream>
#include <regex>
#include <sstream>
#include <stdexcept>

#include "plan/plan_names.h"

namespace bn_standalone {

using namespace batchnorm_cuda;

namespace {

constexpr Named<Op> kOpNames[] = {{"forward", Op::kForwardTraining},
                                  {"backward", Op::kBackwardTraining},
                                  {"eval", Op::kForwardEval}};
constexpr Named<Dtype> kDtypeNames[] = {{"bfloat16", Dtype::kBFloat16},
                                        {"double", Dtype::kDouble},
                                        {"float", Dtype::kFloat},
                                        {"half", Dtype::kHalf}};

template <typename T, size_t kCount>
T choose(const std::string& flag, const std::string& value, const Named<T> (&known)[kCount]) {
  if (const T* found = find_value(known, value)) return *found;
  std::string expected;
  for (const Named<T>& each : known) expected += std::string(" ") + each.name;
  throw std::invalid_argument(flag + ": expected one of" + expected + ", got '" + value + "'");
}

int64_t parse_integer(const std::string& flag, const std::string& value, int64_t least) {
  char* end = nullptr;
  const int64_t number = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end != '\0' || number < least) {
    throw std::invalid_argument(flag + ": expected an integer of at least " +
                                std::to_string(least) + ", got '" + value + "'");
  }
  return number;
}

void set_option(const std::string& flag, const std::string& value, Options* o) {
  if (flag == "--op") {
    o->problem.op = choose(flag, value, kOpNames);
    o->op_name = value;
  } else if (flag == "--dtype") {
    o->problem.dtype = choose(flag, value, kDtypeNames);
    o->dtype_name = value;
  } else if (flag == "--strategy") {
    o->plan.strategy = choose(flag, value, kStrategies);
  } else if (flag == "--scope") {
    o->plan.scope = choose(flag, value, kScopes);
  } else if (flag == "--team-size") {
    o->plan.team_size = static_cast<int>(parse_integer(flag, value, 0));
  } else if (flag == "--n") {
    o->problem.n = parse_integer(flag, value, 1);
  } else if (flag == "--c") {
    o->problem.c = parse_integer(flag, value, 1);
  } else if (flag == "--s") {
    o->problem.s = parse_integer(flag, value, 1);
  } else if (flag == "--seed") {
    o->seed = static_cast<uint64_t>(parse_integer(flag, value, 0));
  } else if (flag == "--repeat") {
    o->repeat = static_cast<int>(parse_integer(flag, value, 1));
  } else if (flag == "--device-json") {
    o->device_json = value;
  } else {
    throw std::invalid_argument("unknown option " + flag);
  }
}

// Reads `text` as the type of the field it goes to.
void assign(const std::string& text, std::string* field) { *field = text; }
void assign(const std::string& text, bool* field) { *field = text == "true" || text == "1"; }
template <typename T>
void assign(const std::string& text, T* field) {
  *field = static_cast<T>(std::stoll(text));
}

}  // namespace

const char* usage() {
  return "usage: bn_standalone --op forward|backward|eval --n N --c C --s S\n"
         "         [--dtype half|bfloat16|float|double] [--strategy auto|two_pass|team]\n"
         "         [--scope auto|block|cluster|grid] [--team-size BLOCKS]\n"
         "         [--seed 1] [--repeat 10] [--device-json FILE]\n"
         "The input is [N, C, S] in memory; S = 1 is channels last with N positions.\n"
         "Exit status: 0 all within tolerance, 1 not, 2 no GPU, 3 wrong usage.\n";
}

Options parse_options(int argc, char** argv) {
  Options options;
  set_option("--op", "forward", &options);
  set_option("--dtype", "float", &options);
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--break-reference") {
      options.break_reference = true;
    } else if (i + 1 < argc) {
      set_option(flag, argv[++i], &options);
    } else {
      throw std::invalid_argument(flag + ": expected a value");
    }
  }
  Problem& p = options.problem;
  if (p.n == 0 || p.c == 0 || p.s == 0) throw std::invalid_argument("expected --n, --c and --s");
  if (p.op == Op::kBackwardTraining) p.grad_output_shift = 0;
  return options;
}

void read_device_json(const std::string& path, DeviceInfo* device) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument("--device-json: cannot read '" + path + "'");
  std::ostringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  const std::regex entry("\"(\\w+)\"\\s*:\\s*(?:\"([^\"]*)\"|([-\\w]+))");
  for (std::sregex_iterator match(text.begin(), text.end(), entry), end; match != end; ++match) {
    const std::string key = (*match)[1];
    const std::string value = (*match)[2].matched ? (*match)[2] : (*match)[3];
    bool known = false;
    const auto field = [&](const char* name, auto* target) {
      if (key != name) return;
      assign(value, target);
      known = true;
    };
    field("name", &device->name);
    field("compute_major", &device->compute_major);
    field("compute_minor", &device->compute_minor);
    field("sm_count", &device->sm_count);
    field("max_threads_per_sm", &device->max_threads_per_sm);
    field("registers_per_sm", &device->registers_per_sm);
    field("shared_bytes_per_sm", &device->shared_bytes_per_sm);
    field("shared_bytes_per_block", &device->shared_bytes_per_block);
    field("shared_bytes_per_block_optin", &device->shared_bytes_per_block_optin);
    field("l2_bytes", &device->l2_bytes);
    field("max_grid", &device->max_grid);
    field("cooperative", &device->cooperative);
    field("max_cluster", &device->max_cluster);
    field("clusters_of_2", &device->clusters_of_2);
    field("clusters_of_4", &device->clusters_of_4);
    field("clusters_of_8", &device->clusters_of_8);
    if (!known) throw std::invalid_argument("--device-json: unknown property '" + key + "'");
  }
}

}  // namespace bn_standalone
