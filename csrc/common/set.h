// Which instruction set a file is compiled for. setup.py compiles every *_kernels.cpp once for each set, the other
// files once, for the compiler's own.
#pragma once

// The name of the set, a namespace of its own: the linker keeps one copy of an inline function or a template, and that
// of a wider set must not run on a lesser processor. What kernels share lies in this namespace or is always inlined;
// they use no templates of the standard library's.
#ifndef RERANK_FAST_SET
#define RERANK_FAST_SET portable
#endif

#define RERANK_FAST_INLINE inline __attribute__((always_inline))
