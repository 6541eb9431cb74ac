"""Where gradient modes and checkpoints begin and end, as torch.fx does not see in a trace."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import saved_tensors_hooks


class Regions:
    """Knows them within `with`, where autograd's Functions are nodes, too: they hide what they do.

    Both kinds of checkpoint are seen by this: one is a Function, the other hooks on saved tensors.
    """

    def __init__(self) -> None:
        self._entered: list[saved_tensors_hooks] = []

    def current(self) -> object:
        """Equal for calls between which none begins or ends."""
        return self._entered[-1] if self._entered else None, torch.is_grad_enabled()

    def __enter__(self) -> Regions:
        function, hooks = torch.autograd.Function, saved_tensors_hooks
        apply = function.__dict__["apply"]
        self._replaced = apply, hooks.__enter__, hooks.__exit__

        def apply_as_node(cls: type, *args: Any, **kwargs: Any) -> Any:
            flat = [*args, *kwargs.values()]
            proxies = [value for value in flat if isinstance(value, fx.Proxy)]
            if not proxies:
                return apply.__get__(None, cls)(*args, **kwargs)
            return proxies[0].tracer.create_proxy("call_function", cls, tuple(proxies), {})

        def entered(hooks: saved_tensors_hooks) -> None:
            self._entered.append(hooks)

        def left(hooks: saved_tensors_hooks, *_: object) -> None:
            self._entered.pop()

        function.apply = classmethod(apply_as_node)
        hooks.__enter__, hooks.__exit__ = entered, left
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.autograd.Function.apply = self._replaced[0]
        saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = self._replaced[1:]
