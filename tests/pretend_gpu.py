"""A pretend GPU: a device whose tensors compute on the CPU, but are as strict as tensors on a GPU.

    pipe = common.load_pipeline(common.DIGITS_CLEAN, pretend_gpu.DEVICE)
    latents = common.encode(pipe, images)  # an error if a tensor were on the wrong device
    print(pretend_gpu.waits(lambda: common.decode(pipe, latents)))

As on a GPU, an operation on tensors of this device and of the CPU is an error. Only CPU tensors without
dimensions and CPU index tensors are allowed. There is no .numpy(), and no CPU generator draws on the device.
"""

from collections import Counter

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# The first backward pass of a process starts a thread for each device, and a process with such threads cannot
# fork for a training run, as other tests do. So this pass takes place before there is a second device, and
# later passes are told to need no threads.
torch.ones(1, requires_grad=True).sum().backward()
torch.autograd.set_multithreading_enabled(False)
_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: []  # torch.utils.checkpoint asks for it

DEVICE = torch.device("pretend", 0)
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
TOGETHER = {aten.cat.default, aten.stack.default}  # they take no CPU tensor, even without dimensions
count = Counter()


def waits(call) -> Counter:
    """How often the host waits, in call(), until the device has done all the work that is queued.

    read: the host needs a value or a size: item(), `if`, .cpu(), nonzero, indexing by a boolean mask
    upload: memory of the host is copied to the device: .to(device), or indexing by a CPU tensor or a list.
        With non_blocking=True it is no wait.
    """
    count.clear()
    call()
    return Counter(count)


class Pretend(torch.Tensor):
    """A tensor of the pretend GPU. `inner` is the CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner: torch.Tensor):
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **options, device=DEVICE)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    # because of these two, Module.to() moves the parameters themselves, which an optimizer may hold
    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Pretend(inner["inner"])

    def __reduce_ex__(self, protocol):  # for torch.save; to be read with map_location="cpu"
        return self.detach().cpu().__reduce_ex__(protocol)

    def __format__(self, form):
        return format(self.cpu(), form)

    def tolist(self):
        return self.cpu().tolist()


def each(function, value):
    """The function of a value, or of every value in a list or a tuple."""
    many = isinstance(value, list | tuple)
    return type(value)([each(function, v) for v in value]) if many else function(value)


def run(operation, *args, **kwargs):
    """Runs an operation of torch on the inner tensors, after the checks that a GPU makes."""
    values, to_cpu = [], False
    each(values.append, [*args, *kwargs.values()])
    given = {id(v.inner): v for v in values if isinstance(v, Pretend)}
    if operation in (aten.copy_.default, aten._to_copy.default):
        to_cpu = (kwargs.get("device") or args[0].device).type == "cpu"
        from_cpu = not isinstance(args[operation is aten.copy_.default], Pretend)
        count["read"] += to_cpu
        count["upload"] += from_cpu and not kwargs.get("non_blocking", args[2:] == (True,))
    else:
        check(operation, args, values)

    def inside(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value.inner if isinstance(value, Pretend) else value

    def outside(value):
        if id(value) in given:  # an operation in place
            assert given[id(value)].shape == value.shape, f"{operation} in another shape is not supported"
            return given[id(value)]
        return Pretend(value) if isinstance(value, torch.Tensor) else value

    result = operation(*each(inside, args), **{name: each(inside, value) for name, value in kwargs.items()})
    return result if to_cpu else each(outside, result)


def check(operation, args, values) -> None:
    """Counts the waits of an operation, and raises RuntimeError if its operands must not be together."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    plain = [t for t in tensors if not isinstance(t, Pretend)]
    count["read"] += operation in READS
    if operation in INDEXING:
        data, index, *new = args[:3]
        if not new or new[0].numel() > 1:  # to write one value by a mask takes no read
            count["read"] += sum(isinstance(i, Pretend) and i.dtype == torch.bool for i in index)
        if isinstance(data, Pretend):
            plain = [t for t in new if not isinstance(t, Pretend)]
            count["upload"] += sum(i is not None and not isinstance(i, Pretend) for i in index)
    written = operation._schema.is_mutable and any(t is args[0] for t in plain)
    if 0 < len(plain) < len(tensors) and (operation in TOGETHER or written or any(t.dim() for t in plain)):
        found = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, but found {found}")
    if any(isinstance(v, torch.Generator) for v in values):
        raise RuntimeError(f"{operation}: a CPU generator cannot draw on another device")


def arange(*bounds, dtype=None, **_):
    """torch.arange on the device; torch's own gives an empty tensor another shape."""
    return Pretend(torch.arange(*bounds, dtype=dtype))


everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
everything.fallback(run, "PrivateUse1")
own.impl("copy_", lambda *args: run(aten.copy_.default, *args), "PrivateUse1")
for overload in ("arange", "arange.start", "arange.start_step"):
    own.impl(overload, arange, "PrivateUse1")
