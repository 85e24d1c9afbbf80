// What autograd asks of a device, for a GPU that is not there; see tests/rehearsal.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Pretended final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 0; }
  void record(void**, const Stream&, DeviceIndex, EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
static Pretended guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
static impl::DeviceGuardImplRegistrar other(DeviceType::PrivateUse1, &guard);
