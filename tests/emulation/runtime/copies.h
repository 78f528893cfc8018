// cp.async: data arrives at its wait, and not before.
#pragma once

#include "memory.h"

EXPORT void emulation_cp_async(void* shared, const void* global, int bytes, int valid) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    const uintptr_t site = CALLER, target = reinterpret_cast<uintptr_t>(shared), source = reinterpret_cast<uintptr_t>(global);
    const auto size = static_cast<size_t>(bytes);
    if (--w.fuel == 0) refuel(w);
    aligned(w, target, size, "the target of a cp.async", site);
    aligned(w, source, size, "the source of a cp.async", site);
    const uintptr_t byte = target - w.shared_base;
    if (byte >= w.shared_bytes || size > w.shared_bytes - byte) outside(w, target, size, Access::CopyIssue, site);
    // A source that is not read must be mapped all the same: anywhere in an allocation.
    if (!in_allocation(w, source, valid ? size : 1)) outside(w, source, size, Access::Read, site);
    touch<Access::CopyIssue>(w, static_cast<uint32_t>(byte), static_cast<uint32_t>(size), site);
    fiber.copies.push_back({source, static_cast<uint32_t>(byte), static_cast<uint16_t>(size), !valid});
}

EXPORT void emulation_cp_async_commit() {
    Fiber& fiber = *worker->current;
    fiber.groups.push_back(static_cast<uint32_t>(fiber.copies.size()));
}

EXPORT void emulation_cp_async_wait(int pending) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    while (fiber.groups.size() - fiber.retired > static_cast<size_t>(pending)) {
        for (const uint32_t end = fiber.groups[fiber.retired]; fiber.delivered < end; ++fiber.delivered) {
            const Copy& copy = fiber.copies[fiber.delivered];
            auto* target = reinterpret_cast<void*>(w.shared_base + copy.target);
            if (copy.zeros)
                memset(target, 0, copy.bytes);
            else
                memcpy(target, reinterpret_cast<const void*>(copy.source), copy.bytes);
            fill(w.writers + copy.target, w.now, copy.bytes);
        }
        ++fiber.retired;
    }
    if (fiber.retired == fiber.groups.size() && fiber.delivered == fiber.copies.size()) {
        fiber.copies.clear();
        fiber.groups.clear();
        fiber.retired = fiber.delivered = 0;
    }
}
