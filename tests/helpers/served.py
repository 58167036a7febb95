"""Which backend served each attention call, and what it read: `with served() as calls:`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.layer import KVLayer
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall

_SERVING = ("attend", "append_attend", "attend_lengths")


class Served(NamedTuple):
    """One call that a backend has served.

    Attributes:
        backend: its name in `dispatch.BACKENDS`.
        packed: whether it read codes.
        q_len, kv_len: Tq and Tk. Where lengths are tensors (steps in a CUDA graph) Tk is the room that there is.
        from_cache: whether the keys lie in memory of one of our caches: a layer's buffers, or what its `stored_kv`
            returned (the copy of a window and a prompt, an offloaded layer's tokens on the device). Known are the
            layers of the caches given to `served`, and all that were given tokens since. The first prompt of a
            quantized layer, or of a ring that it overflows, is the model's own tensors, and the layer holds those.
    """

    backend: str
    packed: bool
    q_len: int
    kv_len: int
    from_cache: bool


@contextlib.contextmanager
def served(*caches: KVCache) -> Iterator[list[Served]]:
    """The calls that backends serve in the body of the `with`, in their order; all threads. Refused ones are left out.

    Calls that a backend hands to itself count once, as `dispatch` made them. Those of compiled ops count too.
    """
    calls: list[Served] = []
    layers = [layer for cache in caches for layer in cache.kv_layers]
    make_ready = KVLayer.make_ready

    def noting(layer: KVLayer, k: torch.Tensor, v: torch.Tensor) -> None:
        make_ready(layer, k, v)
        if not any(layer is other for other in layers):
            layers.append(layer)

    class Recording:
        """A backend with all the parts that it has, optional ones included."""

        def __init__(self, name: str, backend: Any):
            self._name, self._backend = name, backend

        def __getattr__(self, part: str) -> Any:
            own = getattr(self._backend, part)  # AttributeError where it is an optional part that is missing
            if part == "Repeated":
                return lambda call, *args: Repeated(self, call, own(call, *args))
            if part not in _SERVING:
                return own
            return lambda call, *args: self.note(call, call.k, own, call, *args)

        def note(self, call: AttendCall, k: torch.Tensor, attend: Callable, *args: Any) -> torch.Tensor:
            place = k.untyped_storage().data_ptr()
            known = place != 0 and place in _places(layers)
            out = attend(*args)
            calls.append(Served(self._name, call.packed is not None, call.q.shape[2], call.kv_len, known))
            return out

    class Repeated:
        """What a backend makes of `call`, each layer that repeats it noted."""

        def __init__(self, recording: Recording, call: AttendCall, repeated: Any):
            self._recording, self._call, self._repeated = recording, call, repeated

        def attend(self, q, new, buffers, packed) -> torch.Tensor:
            return self._recording.note(self._call, buffers[0], self._repeated.attend, q, new, buffers, packed)

    backends = {name: Recording(name, backend) for name, backend in dispatch.BACKENDS.items()}
    with mock.patch.dict(dispatch.BACKENDS, backends), mock.patch.object(KVLayer, "make_ready", noting):
        yield calls


def _places(layers: list[KVLayer]) -> set[int]:
    """Where the tensors of layers begin in memory."""
    held = [tensor for layer in layers if layer.is_initialized for tensor, _ in layer.buffers().values()]
    held += [layer.stored_kv().k for layer in layers if layer.is_initialized and layer.seen]
    return {tensor.untyped_storage().data_ptr() for tensor in held}
