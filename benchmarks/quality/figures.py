"""Compare the predictions of a precision with those of the reference. Knows statistics; runs no model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.predictions import Predictions

_SMALLEST = 1e-9  # the probability of all other tokens together; rounding may make it zero or negative


def figures(predictions: Predictions, reference: Predictions) -> dict[str, Any]:
    """Return the figures of one precision.

    Each is a mean over the windows with its standard error, which is computed from the differences between
    windows. Only `same_answers` is a number of windows. Perplexity is exp(mean loss). Its change is
    exp(mean difference of the losses) - 1, a fraction of the reference's perplexity.
    """
    losses, generated = predictions.losses.double(), predictions.generated
    return {
        "perplexity": _exponential(losses.mean(dim=1)),
        "perplexity_change": _exponential((losses - reference.losses.double()).mean(dim=1), less=1),
        "same_token": _mean((predictions.best == reference.best).double().mean(dim=1)),
        "divergence": _mean(divergence(predictions, reference).mean(dim=1)),
        "tokens_until_difference": _mean(common_tokens(generated, reference.generated).double()),
        "same_answers": int((generated == reference.generated).all(dim=1).sum()),
    }


def divergence(predictions: Predictions, reference: Predictions) -> Tensor:
    """Return the Kullback-Leibler divergence from the reference at each position, in nats: [N, SCORED].

    The distributions have an outcome for each candidate, and one for all other tokens together. The result is
    at most the divergence over all tokens, and close to it if the other tokens are unlikely.
    """
    ours, theirs = (_with_rest(p.log_probabilities.double()) for p in (predictions, reference))
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)


def common_tokens(answers: Tensor, reference: Tensor) -> Tensor:
    """Return the number of tokens before the first difference of answers [N, tokens]: [N]."""
    return (answers == reference).long().cumprod(dim=1).sum(dim=1)


def _with_rest(log_probabilities: Tensor) -> Tensor:
    rest = 1 - log_probabilities.exp().sum(dim=-1, keepdim=True)
    return torch.cat([log_probabilities, rest.clamp(min=_SMALLEST).log()], dim=-1)


def _mean(values: Tensor) -> dict[str, float]:
    error = values.std() / math.sqrt(len(values))
    return {"value": float(values.mean()), "standard_error": float(error)}


def _exponential(values: Tensor, less: float = 0) -> dict[str, float]:
    """exp(mean) - less. Its standard error is that of the mean, times the derivative."""
    mean = _mean(values)
    factor = math.exp(mean["value"])
    return {"value": factor - less, "standard_error": factor * mean["standard_error"]}
