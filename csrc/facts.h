// What a network's modules are, remembered as Python objects and compared without running Python:
// planning a forward reads hundreds of modules, and its plan holds while these are what they were.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace densenet_fast {

class Facts {
 public:
  using Objects = std::vector<pybind11::object>;

  // The types of `typed`, keys and values of `dicts`, lengths of `sized`.
  Facts(Objects typed, const std::vector<pybind11::dict>& dicts, Objects sized)
      : typed_(std::move(typed)), sized_(std::move(sized)) {
    for (const auto& object : typed_) types_.push_back(pybind11::type::of(object));
    for (const auto& dict : dicts) {
      dicts_.push_back({dict, {}});
      for (const auto& item : dict) {
        dicts_.back().items.emplace_back(
            pybind11::reinterpret_borrow<pybind11::object>(item.first),
            pybind11::reinterpret_borrow<pybind11::object>(item.second));
      }
    }
    for (const auto& object : sized_) lengths_.push_back(pybind11::len(object));
  }

  // Whether all are what they were.
  bool hold() const {
    for (size_t i = 0; i < typed_.size(); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(typed_[i].ptr())) != types_[i].ptr()) return false;
    }
    for (const Dict& dict : dicts_) {
      if (!same(dict)) return false;
    }
    for (size_t i = 0; i < sized_.size(); ++i) {
      if (pybind11::len(sized_[i]) != lengths_[i]) return false;
    }
    return true;
  }

 private:
  struct Dict {
    pybind11::dict dict;
    std::vector<std::pair<pybind11::object, pybind11::object>> items;
  };

  static bool same(const Dict& were) {
    PyObject *key, *value;
    Py_ssize_t at = 0;
    if (were.dict.size() != were.items.size()) return false;
    for (const auto& [old_key, old_value] : were.items) {
      if (!PyDict_Next(were.dict.ptr(), &at, &key, &value)) return false;
      if (!same(key, old_key.ptr()) || !same(value, old_value.ptr())) return false;
    }
    return true;
  }

  // The same object, or an equal one of a type whose comparison is no one's own.
  static bool same(PyObject* now, PyObject* then) {
    if (now == then) return true;
    if (Py_TYPE(now) != Py_TYPE(then)) return false;
    if (!PyFloat_CheckExact(now) && !PyLong_CheckExact(now) && !PyUnicode_CheckExact(now)) {
      return false;
    }
    return PyObject_RichCompareBool(now, then, Py_EQ) == 1;
  }

  Objects typed_, types_;
  std::vector<Dict> dicts_;
  Objects sized_;
  std::vector<size_t> lengths_;
};

}  // namespace densenet_fast
