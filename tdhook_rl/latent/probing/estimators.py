"""Probes in torch: they train under ``no_grad`` and ``inference_mode`` too, and leave the global generators alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.moments import SMALLEST, require_size
from tdhook_rl.latent.probing.scaling import Scale

_FACTORS = ("left", "right")
#: Sums of squares of larger numbers are none in float64.
LARGEST_SQUARED = 1e150


class TorchEstimator:
    """Base of the estimators; a subclass defines :meth:`scores`, and :meth:`initial` for other weights.

    Inputs (and the values of a regression) are standardised inside, by the rows of ``fit``: each feature is taken about
    its mean and divided by its standard deviation. Steps of one size then suit features of every offset and scale. A
    feature that is constant in ``fit`` counts for nothing. Without an intercept, features are divided by their root
    mean square instead.

    Args:
        widths: of each input; ``None`` for any.
        bias: whether there is an intercept.
        num_classes: classes are 0 to ``num_classes - 1`` (cross-entropy); ``None`` for regression (squared error).
        epochs: passes over the rows, with Adam.
        lr: the learning rate.
        batch_size: rows of one step.
        device: where it trains; where the activations are unless given.
        seed: of the initial weights and the order of the rows; unless given, the seed last set by
            ``torch.manual_seed`` (which is read, not advanced).
        verbose: print the loss of each tenth epoch.

    Attributes:
        weights: the tensors of the fitted estimator by name, for standardised inputs unless the subclass says
            otherwise; empty before ``fit``.
    """

    #: Whether inputs are standardised.
    standardised = True

    @checked
    def __init__(
        self,
        *,
        widths: tuple[int | None, ...] = (None,),
        bias: bool = True,
        num_classes: int | None = None,
        epochs: int = 100,
        lr: float = 1e-2,
        batch_size: int = 128,
        device: torch.device | str | None = None,
        seed: int | None = None,
        verbose: bool = False,
    ) -> None:
        if num_classes is not None and num_classes < 2:
            raise InputError(f"num_classes is at least 2, or None for regression; got {num_classes}")
        if epochs < 1 or batch_size < 1 or lr <= 0:
            raise InputError(f"epochs, batch_size and lr are positive, got {epochs}, {batch_size} and {lr}")
        self.widths = widths
        self.bias = bias
        self.num_classes = num_classes
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.verbose = verbose
        self.weights: dict[str, Tensor] = {}

    def initial(self, widths: list[int], generator: torch.Generator) -> dict[str, Tensor]:
        """The weights that training starts from, without the bias: zeros ``(outputs, *widths)`` unless overridden."""
        return {"weight": torch.zeros(self.outputs, *widths)}

    def scores(self, weights: dict[str, Tensor], *Xs: Tensor) -> Tensor:
        """``(rows, outputs)`` from inputs ``(rows, features)``, without the bias."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """How many scores a row gets: one for each class, or one in a regression."""
        return self.num_classes or 1

    def fit(self, *Xs: Any, y: Any = None) -> TorchEstimator:
        """Train from new weights.

        Args:
            Xs: the inputs, each ``(rows, features)``, tensors or arrays; the labels may follow them.
            y: ``(rows,)``: class numbers, or values in a regression.

        Raises:
            InputError: for shapes or labels that do not fit, NaN, or numbers whose squares float64 does not hold.
        """
        if y is None and len(Xs) == len(self.widths) + 1:
            *Xs, y = Xs  # type: ignore[assignment]
        if y is None:
            raise InputError(f"{type(self).__name__}.fit(inputs, y=labels) was not given labels")
        Xs, y = tuple(_tensor(x, "an input") for x in Xs), _tensor(y, "y")
        # Tensors made in inference mode cannot be trained on: they are copied outside it.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = self._inputs(Xs, self.widths)
            target = self._target(y, [len(x) for x in inputs]).to(inputs[0].device)
            self._scales = [self._scale(x, self._smallest(x)) for x in inputs] if self.standardised else []
            self._unit = Scale.none(target)
            if self.standardised and self.num_classes is None:
                self._unit = self._scale(target)
                target = self._unit.of(target.double()).to(inputs[0].dtype)
            weights = self._train(self._scaled(inputs), target)
            self.weights = self.raw(weights)
            self._fitted = tuple(x.shape[1] for x in inputs)
        return self

    def raw(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that are kept; a subclass may turn them into weights of inputs as they are."""
        return weights

    def predict(self, *Xs: Tensor) -> Tensor:
        """``(rows,)``: the most likely class, or the value of a regression.

        Raises:
            InputError: before ``fit``, for inputs of another width, or NaN.
        """
        scores = self._scored(Xs)
        return scores.squeeze(-1) if self.num_classes is None else scores.argmax(-1)

    def predict_proba(self, *Xs: Tensor) -> Tensor:
        """``(rows, classes)``: the probability of each class."""
        if self.num_classes is None:
            raise InputError("a regression has no class probabilities: give num_classes")
        return self._scored(Xs).softmax(-1)

    def _train(self, inputs: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        seed = torch.initial_seed() if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(stream_of(seed, "fit"))  # by the seed itself inputs may be drawn
        first = inputs[0]
        start = self.initial([x.shape[1] for x in inputs], generator)
        start |= {"bias": torch.zeros(self.outputs)} if self.bias else {}
        weights = {name: value.to(first.device, first.dtype).requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=self.lr)
        for epoch in range(self.epochs):
            order = torch.randperm(len(target), generator=generator).to(first.device)
            total = torch.zeros((), device=first.device)
            for rows in order.split(self.batch_size):
                loss = self._loss(self._with_bias(weights, [x[rows] for x in inputs]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(rows)
            if self.verbose and epoch % 10 == 0:
                print(f"{type(self).__name__}: epoch {epoch}, loss {float(total) / len(target):.4g}")
        return {name: value.detach() for name, value in weights.items()}

    def _loss(self, scores: Tensor, target: Tensor) -> Tensor:
        if self.num_classes is None:
            return torch.nn.functional.mse_loss(scores.squeeze(-1), target.to(scores.dtype))
        return torch.nn.functional.cross_entropy(scores, target)

    def _with_bias(self, weights: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
        scores = self.scores(weights, *inputs)
        return scores + weights["bias"] if "bias" in weights else scores

    def _scored(self, Xs: tuple[Tensor, ...]) -> Tensor:
        if not self.weights:
            raise InputError(f"this {type(self).__name__} predicts before it was fitted: call fit(..., y=labels) first")
        with torch.no_grad():
            inputs = self._inputs(tuple(_tensor(x, "an input") for x in Xs), self._fitted)
            dtype = inputs[0].dtype
            # Apple's devices have no float64; elsewhere a sum of features far from zero keeps its digits.
            wide = dtype if inputs[0].device.type == "mps" else torch.float64
            weights = {name: value.to(inputs[0].device, wide) for name, value in self.weights.items()}
            scores = self._with_bias(weights, [x.to(wide) for x in self._scaled(inputs)])
            return (scores if self.num_classes is not None else self._unit.back(scores)).to(dtype)

    def _scale(self, values: Tensor, smallest: float = 0.0) -> Scale:
        return Scale.by(values, centred=self.bias, smallest=smallest)

    def _smallest(self, inputs: Tensor) -> float:
        """The spread below which a feature counts as constant."""
        return 0.0

    def _scaled(self, inputs: list[Tensor]) -> list[Tensor]:
        if not self._scales:
            return inputs
        return [scale.of(x.to(scale.mean)).to(x.dtype) for x, scale in zip(inputs, self._scales, strict=True)]

    def _inputs(self, Xs: tuple[Tensor, ...], widths: tuple[int | None, ...]) -> list[Tensor]:
        fits = len(Xs) == len(widths) and all(
            x.ndim == 2 and width in (None, x.shape[1]) for x, width in zip(Xs, widths, strict=True)
        )
        if not fits:
            raise InputError(
                f"{type(self).__name__} takes {len(widths)} input(s) of shape (rows, features) with features "
                f"{['any' if width is None else width for width in widths]}, got {[tuple(x.shape) for x in Xs]}"
            )
        for x in Xs:
            _require_finite(x, "inputs")
            require_size(x, "inputs", LARGEST_SQUARED)
        dtype = torch.float64 if all(x.dtype == torch.float64 for x in Xs) else torch.float32
        device = Xs[0].device if self.device is None else torch.device(self.device)
        return [x.detach().to(device, dtype, copy=True) for x in Xs]

    def _target(self, y: Tensor, rows: list[int]) -> Tensor:
        if y.ndim != 1 or set(rows) != {len(y)} or not len(y):
            raise InputError(f"labels of shape {tuple(y.shape)} do not fit inputs of {rows} rows")
        y = y.detach().clone()
        _require_finite(y, "labels" if self.num_classes else "values")
        if self.num_classes is None:
            require_size(y, "values", LARGEST_SQUARED)
            return y
        if y.is_floating_point() and not torch.equal(y, y.round()):
            raise InputError(f"{type(self).__name__} with num_classes fits class numbers, got fractions ({y.dtype})")
        y = y.long()
        if not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise InputError(f"labels go from {int(y.min())} to {int(y.max())}, expected 0 to {self.num_classes - 1}")
        return y


def _require_finite(values: Tensor, what: str) -> None:
    """Raise :class:`InputError` for NaN or infinite values, of which one leaves no weight a number."""
    if values.is_floating_point() and not surely_finite(values):
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
        if bool(rows.any()):
            raise InputError(
                f"{what} hold NaN or infinite values in {int(rows.sum())} of {len(rows)} rows (row "
                f"{int(rows.long().argmax())} first): leave these rows out"
            )


def _tensor(value: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is a tensor or an array of numbers, got a {type(value).__name__} ({error})") from None


class LinearEstimator(TorchEstimator):
    """Scores ``weight @ x + bias``: softmax regression, or linear regression without ``num_classes``.

    Args:
        d_latent: the width of the input; taken from the data unless given.
        bias: whether there is an intercept.
        options: ``num_classes``, ``epochs``, ``lr``... of :class:`TorchEstimator`.

    Its ``weights`` are those of inputs as they are: ``weight[k]`` is the direction that raises the score of class k.

    Reference: Alain & Bengio 2017, "Understanding intermediate layers using linear classifier probes".

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = LinearEstimator(num_classes=2, lr=0.1).fit(x, y=(x[:, 0] > 0).long())
        >>> bool((probe.predict(x) == (x[:, 0] > 0)).float().mean() > 0.95)
        True
    """

    @checked
    def __init__(self, d_latent: int | None = None, bias: bool = True, **options: Any) -> None:
        super().__init__(widths=(d_latent,), bias=bias, **options)

    def scores(self, weights: dict[str, Tensor], *Xs: Tensor) -> Tensor:
        return Xs[0] @ weights["weight"].T

    def _smallest(self, inputs: Tensor) -> float:
        return 0.0 if inputs.dtype == torch.float64 else SMALLEST  # as weights of inputs as they are

    def raw(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._scales:
            return weights
        scale, unit = self._scales[0], self._unit
        self._scales, self._unit = [], Scale.none(scale.mean)
        weight = unit.grown(weights["weight"].to(scale.mean) / scale.spread)
        kept = {"weight": weight.to(weights["weight"].dtype)}
        if "bias" in weights:
            # float64: of features far from zero, rounding it would shift every score
            kept["bias"] = unit.back(weights["bias"].to(scale.mean)) - kept["weight"].to(scale.mean) @ scale.mean
        return kept


class BilinearEstimator(TorchEstimator):
    """Scores ``x1 @ weight[k] @ x2 + bias[k]`` of two activations, standardised.

    Args:
        d_latent1, d_latent2: the widths of the inputs; taken from the data unless given.
        bias: whether there is an intercept.
        options: ``num_classes``, ``epochs``, ``lr``... of :class:`TorchEstimator`.

    Reference: Pirsiavash, Ramanan & Fowlkes 2009, "Bilinear classifiers for visual recognition".

    Example:
        >>> a, b = torch.randn(2, 400, 2, generator=torch.Generator().manual_seed(0))
        >>> same = (a[:, 0] * b[:, 0] > 0).long()
        >>> probe = BilinearEstimator(num_classes=2, lr=0.1, epochs=20).fit(a, b, y=same)
        >>> bool((probe.predict(a, b) == same).float().mean() > 0.9)
        True
    """

    @checked
    def __init__(
        self, d_latent1: int | None = None, d_latent2: int | None = None, bias: bool = True, **options: Any
    ) -> None:
        super().__init__(widths=(d_latent1, d_latent2), bias=bias, **options)

    def scores(self, weights: dict[str, Tensor], *Xs: Tensor) -> Tensor:
        return torch.einsum("ni,kij,nj->nk", Xs[0], weights["weight"], Xs[1])


class LowRankBilinearEstimator(BilinearEstimator):
    """A bilinear estimator whose matrix of each class is ``left[k].T @ right[k]``, of rank ``rank`` (8 by default).

    Other arguments are those of :class:`BilinearEstimator`.

    Reference: Kim et al. 2017, "Hadamard product for low-rank bilinear pooling".

    Example:
        >>> a, b = torch.randn(2, 400, 2, generator=torch.Generator().manual_seed(0))
        >>> same = (a[:, 0] * b[:, 0] > 0).long()
        >>> probe = LowRankBilinearEstimator(rank=1, num_classes=2, lr=0.1, epochs=20, seed=0).fit(a, b, y=same)
        >>> bool((probe.predict(a, b) == same).float().mean() > 0.9)
        True
    """

    @checked
    def __init__(self, *d_latents: int | None, rank: int = 8, **options: Any) -> None:
        super().__init__(*d_latents, **options)
        if rank < 1:
            raise InputError(f"a low-rank estimator has a rank of at least 1, got {rank}")
        self.rank = rank

    def initial(self, widths: list[int], generator: torch.Generator) -> dict[str, Tensor]:
        # Both factors at zero would be a saddle point.
        factors = [torch.randn(self.outputs, self.rank, width, generator=generator) / width**0.5 for width in widths]
        return dict(zip(_FACTORS, factors, strict=True))

    def scores(self, weights: dict[str, Tensor], *Xs: Tensor) -> Tensor:
        left, right = (torch.einsum("ni,kri->nkr", x, weights[side]) for x, side in zip(Xs, _FACTORS, strict=True))
        return (left * right).sum(-1)


class MeanDifferenceClassifier(LinearEstimator):
    """Two classes, told apart along the difference of their means, halfway between them.

    Args:
        normalize: scale the direction to length 1 (predictions stay, probabilities change).

    Reference: Marks & Tegmark 2024, "The geometry of truth" (mass-mean probes).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 1.0], [2.0, 3.0]])
        >>> probe = MeanDifferenceClassifier().fit(x, y=torch.tensor([0, 0, 1, 1]))
        >>> probe.coef_.tolist(), float(probe.intercept_), probe.predict(x).tolist()
        ([1.0, 0.0], -1.0, [0, 0, 1, 1])
    """

    standardised = False  # the direction is that of the means as they are

    @checked
    def __init__(self, normalize: bool = True) -> None:
        super().__init__(num_classes=2)
        self.normalize = normalize

    @property
    def coef_(self) -> Tensor:
        """The direction from class 0 to class 1, ``(features,)``."""
        return self.weights["weight"][1]

    @property
    def intercept_(self) -> Tensor:
        """Minus the score of the point halfway between the means."""
        return self.weights["bias"][1].to(self.coef_.dtype)

    def _train(self, inputs: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        counts = target.bincount(minlength=2).tolist()
        if not all(counts):
            raise InputError(f"a difference of means needs both classes, got {counts} rows of classes 0 and 1")
        wide = inputs[0].dtype if inputs[0].device.type == "mps" else torch.float64
        negative, positive = (inputs[0][target == label].to(wide).mean(0) for label in (0, 1))
        direction = positive - negative
        if self.normalize:
            direction = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        weight = torch.stack([torch.zeros_like(direction), direction]).to(inputs[0].dtype)
        return {"weight": weight, "bias": -weight.to(wide) @ (positive + negative) / 2}
