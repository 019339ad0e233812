// How the kernels reach Python: each bind_*.cpp adds methods to the class Backend.
//
// A method takes addresses (tensor.data_ptr()) and sizes, all as integers: that costs 0.4 us a call, two tensors through
// DLPack cost 4.6 us. It checks nothing but what only it can know; kernels/cpu.py checks types, shapes and contiguity.
// Every method lets go of the interpreter lock while it computes.
#pragma once

#include <nanobind/nanobind.h>

#include "backend.h"

namespace weft {

namespace nb = nanobind;
using BackendClass = nb::class_<Backend>;
using unlocked = nb::call_guard<nb::gil_scoped_release>;

void bind_embedding(nb::module_& module, BackendClass& backend);
void bind_linear(nb::module_& module, BackendClass& backend);
void bind_w4ax(nb::module_& module, BackendClass& backend);
void bind_program(nb::module_& module);
void bind_race(nb::module_& module);
void bind_seam(nb::module_& module, BackendClass& backend);
void bind_probe(BackendClass& backend);
void bind_attention(nb::module_& module, BackendClass& backend);

}  // namespace weft
