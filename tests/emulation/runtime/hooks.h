// What the compiler calls in front of loads, stores, indices and integer arithmetic.
#pragma once

#include "memory.h"

#define HOOKS(bytes)                                                                                     \
    EXPORT void __tsan_read##bytes(void* address) { check<Access::Read>(address, bytes, CALLER); }       \
    EXPORT void __tsan_write##bytes(void* address) { check<Access::Write>(address, bytes, CALLER); }     \
    EXPORT void __tsan_unaligned_read##bytes(void* address) { check<Access::Read>(address, bytes, CALLER); } \
    EXPORT void __tsan_unaligned_write##bytes(void* address) { check<Access::Write>(address, bytes, CALLER); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
EXPORT void __tsan_read_range(void* address, unsigned long bytes) { check<Access::Read>(address, bytes, CALLER); }
EXPORT void __tsan_write_range(void* address, unsigned long bytes) { check<Access::Write>(address, bytes, CALLER); }
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}

namespace {
struct Location {
    const char* file;
    uint32_t line, column;
};
struct TypeName {
    uint16_t kind, info;
    char name[1];
};
struct Mismatch {
    Location location;
    const TypeName* type;
    uint8_t log_alignment, kind;
};
struct Bounds {
    Location location;
    const TypeName *array, *index;
};
}  // namespace

EXPORT void __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
    aligned(*worker, address, size_t{1} << data->log_alignment, data->type->name, CALLER);
}
EXPORT void __ubsan_handle_out_of_bounds(const Bounds* data, uintptr_t index) {
    fail(*worker, worker->thread, CALLER, "index %ld of an array of type %s", static_cast<long>(index), data->array->name);
}
#define UNDEFINED(name, what) \
    EXPORT void __ubsan_handle_##name() { fail(*worker, worker->thread, CALLER, what); }
UNDEFINED(divrem_overflow, "division by zero, or of the smallest integer by -1")
UNDEFINED(add_overflow, "a signed sum overflows")
UNDEFINED(sub_overflow, "a signed difference overflows")
UNDEFINED(mul_overflow, "a signed product overflows")
UNDEFINED(negate_overflow, "a signed negation overflows")
UNDEFINED(shift_out_of_bounds, "a shift by a negative number or by the type's width or more")
