// A CUDA device for TVM that runs kernels in the SIMT executor. TVM's own host code, virtual machine and artifacts use it
// as they would use a GPU: device 0 of kind "cuda", whose memory is the host's, with guards around every allocation.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <string>
#include <vector>

extern "C" {
void* simt_allocate(size_t bytes);
void simt_free(void* data);
const char* simt_launch(void (*kernel)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                        const uintptr_t* image, char* const* shared);
}

namespace ffi = tvm::ffi;

namespace {

bool present = false;

class SimtDevice final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device) final {}
  void GetAttr(tvm::Device device, tvm::runtime::DeviceAttrKind kind, ffi::Any* out) final {
    using namespace tvm::runtime;
    switch (kind) {
      case kExist: *out = int(present && device.device_id == 0); return;
      case kComputeVersion: *out = std::string("8.0"); return;
      case kDeviceName: *out = std::string("SIMT executor"); return;
      case kWarpSize: *out = 32; return;
      case kMaxThreadsPerBlock: *out = 1024; return;
      case kMaxSharedMemoryPerBlock: *out = 48 << 10; return;
      case kMultiProcessorCount: *out = 1; return;
      case kTotalGlobalMemory:
      case kAvailableGlobalMemory: *out = int64_t(1) << 32; return;
      default: *out = 0; return;
    }
  }
  void* AllocDataSpace(tvm::Device, size_t bytes, size_t, DLDataType) final { return simt_allocate(bytes); }
  void FreeDataSpace(tvm::Device, void* data) final { simt_free(data); }
  void StreamSync(tvm::Device, TVMStreamHandle) final {}
  TVMStreamHandle CreateStream(tvm::Device) final { return nullptr; }
  void FreeStream(tvm::Device, TVMStreamHandle) final {}
  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t size, tvm::Device,
                      tvm::Device, DLDataType, TVMStreamHandle) final {
    std::memcpy(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset, size);
  }
};

struct Kernel {
  std::string types;  // of its arguments: 'p' pointer, 'f' float, 'i' and 'l' int32 and int64
  std::vector<int> dimensions;  // which of grid x y z, block x y z each launch parameter is
  void (*entry)(void**);
};

class SimtModule final : public ffi::ModuleObj {
 public:
  const char* kind() const final { return "cuda"; }
  int GetPropertyMask() const final { return ffi::Module::kRunnable | ffi::Module::kBinarySerializable; }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final;
  ffi::String InspectSource(const ffi::String&) const final { return source; }

  ffi::Map<ffi::String, ffi::Array<ffi::Any>> kernels;
  ffi::String source;
  uintptr_t image[2];
  char* shared[2];
};

ffi::Optional<ffi::Function> SimtModule::GetFunction(const ffi::String& name) {
  auto found = kernels.find(name);
  if (found == kernels.end()) return std::nullopt;
  const auto& spec = (*found).second;
  Kernel kernel{spec[0].cast<ffi::String>(), {}, reinterpret_cast<void (*)(void**)>(spec[1].cast<int64_t>())};
  for (int64_t d : spec[2].cast<ffi::Array<int64_t>>()) kernel.dimensions.push_back(static_cast<int>(d));
  auto self = ffi::details::ObjectUnsafe::ObjectPtrFromUnowned<ffi::Object>(this);
  std::string label = name;
  return ffi::Function::FromPacked([this, self, kernel, label](ffi::PackedArgs args, ffi::Any*) {
    const auto* raw = reinterpret_cast<const TVMFFIAny*>(args.data());
    const size_t count = kernel.types.size();
    std::vector<uint64_t> values(count);
    std::vector<void*> pointers(count);
    for (size_t i = 0; i < count; ++i) {
      switch (kernel.types[i]) {
        case 'p': std::memcpy(&values[i], &raw[i].v_ptr, 8); break;
        case 'f': {
          const auto number = static_cast<float>(raw[i].v_float64);
          std::memcpy(&values[i], &number, 4);
          break;
        }
        default: std::memcpy(&values[i], &raw[i].v_int64, 8);
      }
      pointers[i] = &values[i];
    }
    unsigned size[6] = {1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < kernel.dimensions.size(); ++i) {
      const int64_t extent = raw[count + i].v_int64;
      if (extent > 0) size[kernel.dimensions[i]] = static_cast<unsigned>(extent);
    }
    const char* fault = simt_launch(kernel.entry, pointers.data(), size, size + 3, image, shared);
    if (fault != nullptr) TVM_FFI_THROW(RuntimeError) << "kernel " << label << ": " << fault;
  });
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  static auto* device = new SimtDevice();  // never destroyed: TVM may ask for it until the process ends
  auto get = [](ffi::PackedArgs, ffi::Any* out) { *out = static_cast<void*>(device); };
  refl::GlobalDef()
      .def_packed("device_api.cuda", get)
      .def_packed("device_api.cuda_host", get)
      .def("simt.set_present", [](bool is) { present = is; })
      .def("simt.module", [](ffi::Map<ffi::String, ffi::Array<ffi::Any>> kernels, ffi::String source,
                             ffi::Array<int64_t> limits) {
        auto module = ffi::make_object<SimtModule>();
        module->kernels = kernels, module->source = source;
        for (int i = 0; i < 2; ++i) {
          module->image[i] = static_cast<uintptr_t>(limits[i]);
          module->shared[i] = reinterpret_cast<char*>(limits[2 + i]);
        }
        return ffi::Module(module);
      });
}

}  // namespace
