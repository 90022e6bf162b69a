// A kernel that spoils the process's CUDA context, for probe's task `faults`.
namespace {
__global__ void writeTo(int* address) {
  *address = 1;
}
}  // namespace

void launchFault() {
  writeTo<<<1, 1>>>(reinterpret_cast<int*>(64));
}
