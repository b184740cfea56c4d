"""Sentences of a comparison's report in English and Japanese; figures are put in by name, the same in both."""

from __future__ import annotations

import math

from clusterbatch.config import RunConfig
from clusterbatch.config.experiments import Language
from clusterbatch.experiments.compare.larger_batches import catch_up
from clusterbatch.experiments.compare.results import ArmResult, Comparison
from clusterbatch.reporting.page import amount
from clusterbatch.reporting.phrases import comparison_phrases


def figures(comparison: Comparison, config: RunConfig, language: Language) -> dict[str, str]:
    """Return the measured figures that sentences are made of, about the decisive arm."""
    arm = comparison.decisive
    verdict = arm.verdict
    assert verdict is not None
    trained = arm.training.beside(comparison.baseline.training)
    return {
        "arm": arm.name,
        "reference": comparison.reference,
        "metric": comparison.metric,
        "own": f"{arm.spread.mean:.4f}",
        "baseline": f"{comparison.baseline.spread.mean:.4f}",
        "untrained": f"{comparison.untrained:.4f}",
        "gain": f"{verdict.gain:+.4f}",
        "low": _figure(verdict.low, "+.4f"),
        "high": _figure(verdict.high, "+.4f"),
        "confidence": f"{100 * comparison.confidence:g} %",
        "min_gain": f"{config.compare.decide.min_gain:.4f}",
        "max_cost": f"{100 * (config.compare.decide.max_cost or 0):.0f} %",
        "detectable": _figure(verdict.detectable, ".4f"),
        "factor": f"{1 + verdict.extra_cost:.1f}",
        "seeds": str(arm.spread.seeds),
        "queries": f"{arm.spread.queries:,}",
        "collections": ", ".join(comparison.collections),
        "of_one_query": ", ".join(name for name in comparison.collections if len(comparison.queries[name]) == 1),
        # Of the two arms that are spoken of.
        "runs": str(2 * arm.spread.seeds),
        "steps": f"{comparison.steps[-1]:,}",
        "epochs": f"{trained.epochs:.2g}",
        "epoch_steps": f"{math.ceil(comparison.steps[-1] / trained.epochs):,}",
        "more_steps": f"{2 * comparison.steps[-1]:,}",
        "cheaper": comparison.cheaper.name if comparison.cheaper else "",
        "minutes": amount(arm.cost.seconds / 60),
        "baseline_minutes": amount(comparison.baseline.cost.seconds / 60),
        "shared_minutes": amount(arm.cost.shared_seconds / 60),
        "price": _cost(arm, config, language),
        "baseline_price": _cost(comparison.baseline, config, language),
        "requests": f"{_requests(arm):,}",
        "baseline_requests": f"{_requests(comparison.baseline):,}",
        "mib_read": f"{arm.cost.traffic.bytes_read / 2**20:,.1f}",
        "baseline_mib_read": f"{comparison.baseline.cost.traffic.bytes_read / 2**20:,.1f}",
        "seeds_needed": str(verdict.seeds_needed),
        "queries_needed": f"{verdict.queries_needed or 0:,}",
        "both_seeds": str(verdict.both_needed[0] if verdict.both_needed else 0),
        "both_queries": f"{verdict.both_needed[1] if verdict.both_needed else 0:,}",
    }


def answer(comparison: Comparison, config: RunConfig, language: Language) -> str:
    """Return a sentence or two: the verdict, the gain with its interval, the cost, what to do."""
    words, values = comparison_phrases(language), figures(comparison, config, language)
    sentences = [words[f"answer {_reason(comparison)}"].format(**values)]
    sentences += [further(comparison, language), next_step(comparison, config, language)]
    # Japanese has no space between sentences.
    return ("" if language == "ja" else " ").join(sentence for sentence in sentences if sentence)


def further(comparison: Comparison, language: Language) -> str:
    """Return what a dearer arm would add, at what price, if a cheaper one is recommended; otherwise nothing."""
    best, arm = comparison.best, comparison.decisive
    if best.name == arm.name:
        if comparison.cheaper is None:
            return ""
        best, arm = arm, comparison.cheaper
        key = "beside"
    else:
        key = "further"
    over = comparison.over(best, arm)
    key += " none" if over.gain <= 0 or over.outcome == "does not pay" else " open"
    return comparison_phrases(language)[key].format(
        arm=arm.name,
        best=best.name,
        gain=f"{over.gain:+.4f}",
        low=_figure(over.low, "+.4f"),
        high=_figure(over.high, "+.4f"),
        times=f"{over.extra_cost + 1:.1f}",
    )


def next_step(comparison: Comparison, config: RunConfig, language: Language) -> str:
    """Return what to do now."""
    verdict = comparison.decisive.verdict
    assert verdict is not None
    words, values = comparison_phrases(language), figures(comparison, config, language)
    key = _reason(comparison)
    if key == "gain" and comparison.cheaper:
        key = "gain, cheaper"
    if key == "wide interval":
        if verdict.seeds_needed:
            key = "wide interval, seeds"
        elif verdict.queries_needed:
            key = "wide interval, queries"
        elif verdict.both_needed:
            key = "wide interval, both"
        else:
            key = "wide interval, nothing"
    return words[f"next {key}"].format(**values)


def verdict_word(arm: ArmResult, language: Language) -> str:
    return comparison_phrases(language)[arm.verdict.outcome if arm.verdict else "baseline"]


def meeting_sentences(comparison: Comparison, config: RunConfig, language: Language) -> list[str]:
    """Return sentences with the measured figures in them, for somebody who has to speak about it."""
    words, values = comparison_phrases(language), figures(comparison, config, language)
    setup = "say setup" if _masks(comparison.decisive) == _masks(comparison.baseline) else "say setup, other masks"
    verdict = comparison.decisive.verdict
    doubt = "say doubt" if verdict and verdict.detectable is not None else "say doubt, unknown"
    return [words[key].format(**values) for key in (setup, f"say {_reason(comparison)}", "say cost", doubt)]


def same_batches(comparison: Comparison, language: Language) -> list[str]:
    """Return a sentence for each arm with the same batches as others, whose equal figures are no finding."""
    words = comparison_phrases(language)
    return [
        words["same_batches"].format(arm=first, others=", ".join(others)) for first, *others in comparison.same_batches
    ]


def larger_batches(comparison: Comparison, language: Language) -> list[str]:
    """Return sentences on random batches of other sizes instead of the decisive arm; none if none were compared."""
    arm, words = comparison.decisive, comparison_phrases(language)
    found = catch_up(comparison, arm)
    if found is None:
        return []
    values = {
        "arm": arm.name,
        "metric": comparison.metric,
        "size": f"{round(found.size or 0):,}",
        "largest": f"{found.largest:,}",
        "same_compute": f"{found.same_compute or 0:.4f}",
        "own": f"{arm.spread.mean:.4f}",
    }
    key = "catch up never" if found.size is None else "catch up"
    key = "catch up at once" if found.size == found.smallest else key
    sentences = [words[key].format(**values)]
    if found.same_compute is not None:
        sentences.append(words["same compute"].format(**values))
    return sentences


def _figure(value: float | None, form: str) -> str:
    """Return a dash if it is not known; no sentence about such a case has it."""
    return "–" if value is None else f"{value:{form}}"


def _cost(arm: ArmResult, config: RunConfig, language: Language) -> str:
    """Return the price of a run with its currency; without prices its worker hours."""
    cost = arm.cost
    if cost.price is not None:
        return f"{amount(cost.price)} {config.compare.prices.currency}"
    key = "cost in hours, gpu" if cost.gpu_hours else "cost in hours"
    return comparison_phrases(language)[key].format(hours=amount(cost.hours), gpu_hours=amount(cost.gpu_hours))


def _requests(arm: ArmResult) -> int:
    return arm.cost.traffic.reads + arm.cost.traffic.writes


def _masks(arm: ArmResult) -> dict[str, object]:
    return {key: value for key, value in arm.changes.items() if key.startswith("train.mask")}


def _reason(comparison: Comparison) -> str:
    verdict = comparison.decisive.verdict
    assert verdict is not None
    return verdict.reason
