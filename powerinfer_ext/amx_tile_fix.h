/* Force-included (CXXFLAGS="-include .../amx_tile_fix.h") when llama-cpp-python is built with GCC before 12.4,
 * or 13.0 to 13.2.
 *
 * Those compilers declare _tile_loadconfig as reading 8 bytes where the instruction reads 64. The optimiser then
 * drops the stores that fill the other 56 as dead, ldtilecfg loads whatever was on the stack, and the first AMX
 * product faults or is wrong. Saying what is read is the whole fix; no optimisation and no AMX kernel is turned off.
 *
 * Translation units that are not compiled for AMX see nothing of this; a compiler without the fault loses nothing. */
#if defined(__x86_64__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
