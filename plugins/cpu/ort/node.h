// A node of a graph as a session that is being made shows it: fields, types and shapes, and constants.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "ort_api.h"

namespace sinkexport::ort {

struct Tensor {
  int type;
  std::vector<int64_t> shape;

  int64_t elements() const;
};

std::string shown(const std::vector<int64_t>& shape);

// Every problem is one line that names operator, node and field: std::runtime_error, which ends the making of a
// session.
class Node {
 public:
  Node(const Api& api, const OrtKernelInfo* info, const char* operator_name);

  // Fields. Every one must be given, and none beside them.
  int64_t integer(const char* field, int64_t least, int64_t most);
  int size(const char* field, int least = 0);
  bool flag(const char* field) { return integer(field, 0, 1) == 1; }
  float number(const char* field);
  // The place of a field's text in `choices`.
  int choice(const char* field, std::initializer_list<const char*> choices);

  // Inputs, taken in turn: what is `wanted` must be there. shape: the expected one; none: any.
  size_t inputs() const { return inputs_.size(); }
  size_t take(const char* name);  // index of the next input
  size_t take(const char* name, int type, const std::vector<int64_t>& shape);
  const Tensor& input(size_t index) const { return inputs_[index]; }
  // Refuse inputs that were not taken, fields that were not asked for, and outputs other than these.
  void finish(const std::vector<Tensor>& outputs) const;

  // Data of a constant input; null: it is computed.
  const void* constant(size_t index) const;

  [[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected) const;
  // A kernel's own line; null: no problem.
  void refuseIf(const char* problem) const;

 private:
  void readFields();
  const std::string& field(const char* name, const std::string& expected);
  template <typename Number>
  Number parsed(const char* name, const std::string& expected);
  void refuseOtherFields() const;

  const Api& api_;
  const OrtKernelInfo* info_;
  std::string name_;
  std::vector<Tensor> inputs_, outputs_;
  size_t taken_ = 0;
  std::map<std::string, std::string> fields_;  // their values as text
  std::set<std::string> asked_;                // of them
};

}  // namespace sinkexport::ort
