#include "isa.h"

#include "interface.h"

using namespace sinkexport::cpu;

SINKEXPORT_API int sinkexport_cpu_has_isa(int isa) {
  return isa >= 0 && isa < kIsas && hasIsa(static_cast<Isa>(isa));
}
SINKEXPORT_API const char* sinkexport_cpu_isa_name(int isa) {
  return isaName(static_cast<Isa>(isa));
}
// The number of the chosen one, or -1 and a line in `problem`.
SINKEXPORT_API int sinkexport_cpu_choose_isa(const char* name, const char** problem) {
  Isa isa;
  *problem = chooseIsa(name, isa);
  return *problem == nullptr ? static_cast<int>(isa) : -1;
}
