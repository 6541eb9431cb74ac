// One operation on one dtype: device memory, launches, comparison with the reference.
#pragma once

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comparison.h"
#include "host_case.h"
#include "options.h"
#include "sequence.h"

namespace bn_standalone {

template <typename scalar_t>
class Experiment {
 public:
  using acc_t = batchnorm_cuda::acc_type<scalar_t>;

  Experiment(const Options& options, const batchnorm_cuda::DeviceInfo& device)
      : options_(options),
        device_(device),
        plan_(make_plan(options.problem, device, options.plan)),
        host_(options.problem, options.seed),
        x_(host_.x),
        dy_(host_.dy),
        output_(host_.x.size()) {
    output_.fill(0xff);  // NaN: what the kernels leave out is noticed
    call_.problem = options.problem;
    call_.eps = kEps;
    call_.momentum = kMomentum;
    call_.input = x_.data();
    call_.grad_output = dy_.data();
    call_.output = output_.data();
    call_.weight = vector("weight", host_.weight);
    call_.bias = vector("bias", host_.bias);
    call_.running_mean = vector("running_mean", host_.running_mean);
    call_.running_var = vector("running_var", host_.running_var);
    const std::vector<acc_t> none(host_.weight.size());
    call_.sum_dy = vector("sum_dy", none);
    call_.sum_dy_xhat = vector("sum_dy_xhat", none);
    call_.grad_weight = vector("grad_weight", none);
    call_.grad_bias = vector("grad_bias", none);
    upload_statistics();
    reserve_workspace();
  }

  const batchnorm_cuda::Plan& plan() const { return plan_; }

  // Enqueues the operation once.
  void launch() {
    if (launch_call(call_, plan_)) return;
    std::printf("plan: the teams do not all fit on this device; two passes instead\n");
    batchnorm_cuda::PlanOptions two_pass;
    two_pass.strategy = batchnorm_cuda::Strategy::kTwoPass;
    plan_ = make_plan(options_.problem, device_, two_pass);
    reserve_workspace();
    launch_call(call_, plan_);
  }

  // Holds what one launch left against the reference, prints it, and returns whether all is well.
  bool compare() const {
    check(cudaDeviceSynchronize(), "running the kernels");
    const std::vector<scalar_t> got = output_.download();
    const bool backward = options_.problem.op == batchnorm_cuda::Op::kBackwardTraining;
    std::map<std::string, std::vector<acc_t>> vectors;
    for (const auto& entry : vectors_) vectors[entry.first] = entry.second->download();
    std::map<std::string, Comparison> results;
    for (int64_t c = 0; c < options_.problem.c; ++c) {
      const auto hold = [&](const char* name, const Quantity& expected) {
        comparison(results, name, acc_dtype()).add(vectors[name][c], expected);
      };
      const std::vector<Quantity> expected =
          backward ? expect_backward(c, hold) : expect_forward(c, hold);
      hold_output(c, host_.values(got, c), expected,
                  comparison(results, backward ? "grad_input" : "output", options_.problem.dtype));
    }
    bool passed = true;
    for (const auto& entry : results) {
      entry.second.print();
      passed &= entry.second.passed();
    }
    return passed;
  }

 private:
  batchnorm_cuda::Dtype acc_dtype() const {
    return sizeof(acc_t) == sizeof(double) ? batchnorm_cuda::Dtype::kDouble
                                           : batchnorm_cuda::Dtype::kFloat;
  }

  static Comparison& comparison(std::map<std::string, Comparison>& results, const char* name,
                                batchnorm_cuda::Dtype stored) {
    const auto acc = sizeof(acc_t) == sizeof(double) ? batchnorm_cuda::Dtype::kDouble
                                                     : batchnorm_cuda::Dtype::kFloat;
    return results.try_emplace(name, name, stored, acc).first->second;
  }

  acc_t* vector(const char* name, const std::vector<acc_t>& values) {
    return (vectors_[name] = std::make_unique<DeviceBuffer<acc_t>>(values))->data();
  }

  // What the forward pass would have saved for the backward pass; NaN where it is an output.
  void upload_statistics() {
    std::vector<acc_t> mean(host_.weight.size(), NAN), invstd = mean;
    for (int64_t c = 0; c < options_.problem.c && !host_.dy.empty(); ++c) {
      const Moments moments = moments_of(host_.values(host_.x, c));
      mean[c] = static_cast<acc_t>(moments.mean);
      invstd[c] = static_cast<acc_t>(moments.invstd(kEps));
    }
    call_.mean = vector("mean", mean);
    call_.invstd = vector("invstd", invstd);
  }

  void reserve_workspace() {
    const bool team = plan_.strategy == batchnorm_cuda::Strategy::kTeam;
    workspace_ = std::make_unique<DeviceBuffer<char>>(static_cast<size_t>(plan_.workspace_bytes));
    sync_ = std::make_unique<DeviceBuffer<uint64_t>>(
        std::vector<uint64_t>(team ? static_cast<size_t>(plan_.team.sync_words) : 0));
    call_.workspace = workspace_->data();
    call_.sync = sync_->data();
  }

  template <typename Hold>
  std::vector<Quantity> expect_forward(int64_t c, const Hold& hold) const {
    const std::vector<double> x = host_.values(host_.x, c);
    const Channel channel = host_.channel(c);
    const auto count = static_cast<double>(x.size());
    Moments moments{channel.running_mean, channel.running_var, std::fabs(channel.running_mean)};
    if (options_.problem.op == batchnorm_cuda::Op::kForwardTraining) {
      moments = moments_of(x);
      const double unbiased = moments.var * count / (count > 1 ? count - 1 : 1);
      hold("running_mean", running_update(channel.running_mean, moments.mean, kMomentum));
      hold("running_var", running_update(channel.running_var, unbiased, kMomentum));
    }
    const double invstd = moments.invstd(kEps);
    hold("mean", {moments.mean, moments.mean_magnitude});
    hold("invstd", {invstd, invstd});
    std::vector<Quantity> expected;
    for (double value : x) expected.push_back(normalized(value, moments.mean, invstd, channel));
    return expected;
  }

  template <typename Hold>
  std::vector<Quantity> expect_backward(int64_t c, const Hold& hold) const {
    const Gradients gradients =
        gradients_of(host_.values(host_.x, c), host_.values(host_.dy, c), host_.channel(c));
    hold("grad_weight", gradients.weight);
    hold("grad_bias", gradients.bias);
    return gradients.input;
  }

  void hold_output(int64_t c, const std::vector<double>& got, std::vector<Quantity> expected,
                   Comparison& result) const {
    if (options_.break_reference && c + 1 == options_.problem.c) {
      expected.back().value += 0.05 * expected.back().magnitude;
    }
    for (size_t i = 0; i < got.size(); ++i) result.add(got[i], expected[i]);
  }

  const Options& options_;
  const batchnorm_cuda::DeviceInfo& device_;
  batchnorm_cuda::Plan plan_;
  HostCase<scalar_t> host_;
  DeviceBuffer<scalar_t> x_, dy_, output_;
  std::map<std::string, std::unique_ptr<DeviceBuffer<acc_t>>> vectors_;
  std::unique_ptr<DeviceBuffer<char>> workspace_;
  std::unique_ptr<DeviceBuffer<uint64_t>> sync_;
  Call<scalar_t> call_{};
};

}  // namespace bn_standalone
