// NEON with byte products: the same source under other compiler options.
#include "kernels/kernels.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include "neon.cpp"
#else
namespace fallow {
const Kernels* neon_dotprod_kernels() { return nullptr; }
}  // namespace fallow
#endif
