// For test_csrc_amx.py. Preloaded it is a Linux that permits nobody to use tiles; loaded later it looks at them.
#include <cerrno>
#include <cstdarg>
#include <dlfcn.h>
#include <sys/syscall.h>

// In place of the C library's.
extern "C" long syscall(long number, ...) {
  if (number == SYS_arch_prctl) {
    errno = EPERM;
    return -1;
  }
  va_list rest;
  va_start(rest, number);
  long argument[6];
  for (long& value : argument) value = va_arg(rest, long);
  va_end(rest);
  const auto real = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
  return real(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}

// Whether this thread has tiles that the system must save.
extern "C" int tiles_in_use() {
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low >> 18 & 1u) != 0;
}
