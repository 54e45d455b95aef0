"""Managers: one estimator for each site (or pair of sites), with its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, MissingKeyError, PreparationError, nearest
from tdhook_rl.latent.probing.estimators import TorchEstimator


class ProbeManager:
    """Fits and scores one estimator for each site of :class:`Probing`.

    Each TensorDict holds ``labels`` and ``step_type``: with ``"fit"`` every site's estimator is fitted anew on the
    activations and scored on them, with ``"predict"`` the fitted estimators are scored. Labels have any batch shape
    that begins the shape of the activation, ``()``, ``(B,)`` or ``(T, B)``, with or without a last dimension of 1;
    both are flattened to rows. Rows without a number (padding, an activation or a label that is NaN) are left out.

    Args:
        estimator_class: a scikit-learn classifier or regressor (``fit(X, y)``, ``predict(X)``, NumPy arrays on the
            CPU), or a :class:`TorchEstimator` (tensors).
        estimator_kwargs: its keyword arguments.
        compute_metrics: ``compute_metrics(predictions, labels)`` gives the metrics of one site, a dict. Both are
            ``(rows,)``: NumPy arrays for scikit-learn, CPU tensors for a :class:`TorchEstimator`.
        allow_overwrite: let a second fit (or predict) replace the first; otherwise it raises.
        data_preprocess_callback: applied to each activation before it is flattened to rows.

    Attributes:
        estimators: the fitted estimators, by ``f"{path}_{direction}"``, as are:
        fit_metrics: the metrics of the fits.
        predict_metrics: the metrics of the predictions.

    Reference: Alain & Bengio 2017, "Understanding intermediate layers using linear classifier probes".

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.latent.probing import LinearEstimator, Probing
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> def accuracy(predictions, labels):
        ...     return {"accuracy": float((predictions == labels).float().mean())}
        >>> manager = ProbeManager(LinearEstimator, {"num_classes": 2, "lr": 0.1}, accuracy)
        >>> x = torch.randn(400, 4)
        >>> data = TensorDict({"input": x, "labels": x[:, 0] > 0, "step_type": "fit"}, batch_size=400)
        >>> with Probing("1", manager.probe_factory, additional_keys=["labels", "step_type"]).prepare(net) as hooked:
        ...     _ = hooked(data[:200])
        ...     _ = hooked(data[200:].set("step_type", "predict"))
        >>> manager.predict_metrics["1_fwd"]["accuracy"] > 0.8
        True
    """

    @checked
    def __init__(
        self,
        estimator_class: Callable[..., Any],
        estimator_kwargs: Mapping[str, Any],
        compute_metrics: Callable[[Any, Any], dict[str, Any]],
        allow_overwrite: bool = False,
        data_preprocess_callback: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.estimators: dict[str, Any] = {}
        self.fit_metrics: dict[str, dict[str, Any]] = {}
        self.predict_metrics: dict[str, dict[str, Any]] = {}
        self._estimator_class = estimator_class
        self._estimator_kwargs = dict(estimator_kwargs)
        self._compute_metrics = compute_metrics
        self._real: Tensor | None = None  # of the call under way: the rows that are no padding
        self._allow_overwrite = allow_overwrite
        self._preprocess = data_preprocess_callback

    def probe_factory(self, key: str, direction: str) -> ManagedProbe:
        """The probe of one site, for ``Probing(..., manager.probe_factory)``."""
        return ManagedProbe(self, key, direction)

    def reset_estimators(self) -> None:
        """Forget the fitted estimators."""
        self.estimators.clear()

    def reset_metrics(self) -> None:
        """Forget the metrics; without ``allow_overwrite``, what lets one fit or predict again."""
        self.fit_metrics.clear()
        self.predict_metrics.clear()

    def _receive(self, key: str, direction: str, activation: Tensor, labels: Any, step_type: str) -> None:
        self._step(f"{key}_{direction}", [activation], labels, step_type)

    def _step(self, name: str, activations: Sequence[Tensor], labels: Any, step_type: str) -> None:
        if step_type not in ("fit", "predict"):
            raise InputError(f"step_type is 'fit' or 'predict', got {step_type!r}: one string for the whole TensorDict")
        metrics = self.fit_metrics if step_type == "fit" else self.predict_metrics
        if name in metrics and not self._allow_overwrite:
            raise InputError(
                f"the probe {name!r} has {step_type} metrics already: call reset_metrics() before, or make the manager "
                "with allow_overwrite=True"
            )
        if step_type == "predict" and name not in self.estimators:
            raise InputError(
                f"the probe {name!r} is asked to predict but was never fitted (fitted: {list(self.estimators)}): "
                "call the hooked policy with step_type 'fit' first"
            )
        # Inference tensors would make the estimators unusable outside inference mode.
        with torch.inference_mode(False):
            new = step_type == "fit"
            estimator = self._estimator_class(**self._estimator_kwargs) if new else self.estimators[name]
            in_torch = isinstance(estimator, TorchEstimator)
            prepared = activations if self._preprocess is None else map(self._preprocess, activations)
            pairs = [_rows(one, labels, name) for one in prepared]
            pairs = self._usable(pairs, name)
            inputs, y = [x if in_torch else _numpy(x) for x, _ in pairs], pairs[0][1]
            target = y if in_torch else _numpy(y)
            if step_type == "fit":
                estimator.fit(*inputs, y=target)
                self.estimators[name] = estimator
            predictions = estimator.predict(*inputs)
            if in_torch:
                predictions, target = predictions.cpu(), target.cpu()
            metrics[name] = self._compute_metrics(predictions, target)

    def _usable(self, pairs: list[tuple[Tensor, Tensor]], name: str) -> list[tuple[Tensor, Tensor]]:
        """Activations and labels without padding and without rows of which one is NaN or infinite."""
        labels = pairs[0][1]
        kept = torch.stack([torch.isfinite(x).all(-1) for x, _ in pairs]).all(0)
        kept &= torch.isfinite(labels).to(kept.device)
        if self._real is not None and self._real.numel() == kept.numel():
            kept &= self._real.reshape(-1).to(kept.device)
        if bool(kept.all()):
            return pairs
        if not bool(kept.any()):
            raise InputError(f"the probe {name!r} has no rows to learn from: all are padding, or not finite")
        return [(x[kept.to(x.device)], y[kept.to(y.device)]) for x, y in pairs]


class BilinearProbeManager(ProbeManager):
    """Fits and scores one estimator for each pair of sites, on the activations of both.

    Use :attr:`key_pattern` as the pattern of :class:`Probing`, and put the forwards between :meth:`before_all` and
    :meth:`after_all`. Metrics are by ``f"{first}_{second}_{direction}"``.

    Args:
        pairs: ``(first path, second path)`` of each pair.
        estimator_class: a :class:`TorchEstimator` of two inputs, or anything with ``fit(X1, X2, y=)`` and
            ``predict(X1, X2)`` on NumPy arrays.
        estimator_kwargs, compute_metrics, allow_overwrite, data_preprocess_callback: as in :class:`ProbeManager`.

    Reference: Pirsiavash, Ramanan & Fowlkes 2009, "Bilinear classifiers for visual recognition".

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.latent.probing import BilinearEstimator, Probing
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> def error(predictions, labels):
        ...     return {"mse": float((predictions - labels).square().mean())}
        >>> manager = BilinearProbeManager([("0", "1")], BilinearEstimator, {"epochs": 5}, error)
        >>> x = torch.randn(64, 4)
        >>> data = TensorDict({"input": x, "labels": x[:, 0] * x[:, 1], "step_type": "fit"}, batch_size=64)
        >>> probing = Probing(manager.key_pattern, manager.probe_factory, additional_keys=["labels", "step_type"])
        >>> with probing.prepare(net) as hooked:
        ...     manager.before_all()
        ...     _ = hooked(data)
        ...     manager.after_all()
        >>> list(manager.fit_metrics)
        ['0_1_fwd']
    """

    @checked
    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        estimator_class: Callable[..., Any],
        estimator_kwargs: Mapping[str, Any],
        compute_metrics: Callable[[Any, Any], dict[str, Any]],
        allow_overwrite: bool = False,
        data_preprocess_callback: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(estimator_class, estimator_kwargs, compute_metrics, allow_overwrite, data_preprocess_callback)
        self._pairs = [tuple(pair) for pair in pairs]
        if not self._pairs or any(len(pair) != 2 for pair in self._pairs):
            raise InputError(f"pairs is a list of (first path, second path), got {pairs!r}")
        self._waiting: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        self._open = False

    @property
    def key_pattern(self) -> tuple[str, ...]:
        """Every path of the pairs, for ``Probing(manager.key_pattern, ...)``."""
        return tuple(dict.fromkeys(path for pair in self._pairs for path in pair))

    def probe_factory(self, key: str, direction: str) -> ManagedProbe:
        """The probe of one site of some pair.

        Raises:
            InputError: for a site that no pair names.
        """
        if key not in self.key_pattern:
            raise InputError(
                f"the site {key!r} belongs to no pair; {nearest(key, self.key_pattern)}. "
                "Prepare Probing(manager.key_pattern, manager.probe_factory, ...)"
            )
        return super().probe_factory(key, direction)

    def before_all(self) -> None:
        """Begin: forget activations that still wait for their partner; call it before the forwards."""
        self._waiting.clear()
        self._open = True

    def after_all(self) -> None:
        """End: check that every pair was complete; call it after the forwards.

        Raises:
            InputError: if one site of a pair ran without the other, or ``before_all`` was not called.
        """
        if not self._open:
            raise InputError("after_all() without before_all(): call manager.before_all() before the forwards")
        waiting = {pair: list(seen) for pair, seen in self._waiting.items()}
        self._waiting.clear()
        self._open = False
        if waiting:
            (first, second, direction), (seen,) = next(iter(waiting.items()))
            raise InputError(
                f"{len(waiting)} pair(s) still wait, first {(first, second)!r} ({direction}): {seen!r} ran, its "
                "partner did not; name modules that run in the same forward"
            )

    def _receive(self, key: str, direction: str, activation: Tensor, labels: Any, step_type: str) -> None:
        if not self._open:
            raise InputError(
                "a BilinearProbeManager takes activations between before_all() and after_all(): "
                "call manager.before_all() before the forwards"
            )
        for first, second in self._pairs:
            if key not in (first, second):
                continue
            seen = self._waiting.setdefault((first, second, direction), {})
            if key in seen:
                raise InputError(f"{key!r} ran again while the pair {(first, second)!r} still waits for its partner")
            seen[key] = activation
            if len(seen) == len({first, second}):
                del self._waiting[first, second, direction]
                self._step(f"{first}_{second}_{direction}", [seen[first], seen[second]], labels, step_type)


class ManagedProbe:
    """The probe of one site: passes what it is given to its manager."""

    def __init__(self, manager: ProbeManager, key: str, direction: str) -> None:
        self.manager = manager
        self.key = key
        self.direction = direction

    takes_rows = True

    def step(
        self,
        activation: Tensor,
        labels: Any = None,
        step_type: Any = None,
        rows: Tensor | None = None,
        **additional: Any,
    ) -> None:
        """Fit or predict, on the rows that are real (``rows``; all by default) and whose numbers are finite.

        Raises:
            MissingKeyError: without ``labels`` or ``step_type``.
            InputError: for another ``step_type``, labels of a wrong shape, a predict before any fit, a second fit.
        """
        for name, value in (("labels", labels), ("step_type", step_type)):
            if value is None:
                raise MissingKeyError(
                    f"the probe of {self.key!r} needs {name!r}: put it in the TensorDict and list it, "
                    'Probing(..., additional_keys=["labels", "step_type"])'
                )
        self.manager._real = rows
        self.manager._receive(self.key, self.direction, activation, labels, step_type)

    def __reduce__(self) -> Any:
        raise PreparationError(
            f"the probe of {self.key!r} belongs to a manager in this process, and what it learned in a worker would be "
            "lost there: collect with ActivationCaching and probe the batches, or read fitted probes with ProbeReadout"
        )


def _rows(activation: Tensor, labels: Any, name: str) -> tuple[Tensor, Tensor]:
    """``(rows, features)`` and ``(rows,)``; the batch shape is that of the labels."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"labels are a tensor of numbers, got {labels!r:.80}") from None
    shape = tuple(activation.shape)
    batch = tuple(labels.shape)
    if batch and batch[-1] == 1 and (len(batch) > 1 or len(shape) == 1) and batch != shape[: len(batch)]:
        batch = batch[:-1]
    if batch != shape[: len(batch)] or (len(batch) > 1 and batch == shape and batch[-1] != 1):
        raise InputError(
            f"labels of shape {tuple(labels.shape)} do not fit the activation of {name!r} of shape {shape}: "
            "give one label for each row, with the batch shape of the TensorDict"
        )
    rows = labels.numel()
    if not rows:
        raise InputError(f"there are no rows to probe: the labels have shape {tuple(labels.shape)}")
    return activation.detach().reshape(rows, -1), labels.detach().reshape(rows)


def _numpy(value: Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
