// Included in front of every source file of ours by cmake/flags.cmake, which takes back the flags that this
// refuses.
//
// Rows that see nothing are NaN and infinities that must be told apart, and the order of a sum is part of a
// result.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ != 0) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "fastattn: wrong results with -ffast-math, -Ofast, -ffinite-math-only or -funsafe-math-optimizations"
#endif
