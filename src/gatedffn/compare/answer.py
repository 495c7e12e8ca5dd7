"""The answer in words, with no more in it than the intervals show, and how to read it."""

import math

from gatedffn.compare.intervals import CONFIDENCE, analyse
from gatedffn.compare.look import counted, label, signed
from gatedffn.compare.rates import edge_words, rate_curves
from gatedffn.compare.settings import LARGEST_MISMATCH, OPTIMIZERS, ModelName, Setting
from gatedffn.compare.statistics import Row, Verdict, kind
from gatedffn.compare.study import Result
from gatedffn.compare.views import Place, View, ViewName, views

VIEW_TITLES: dict[ViewName, str] = {
    "parameters": "At equal parameters and steps",
    "compute": "At equal compute",
    "time": "At equal time",
}

PHRASES: dict[Verdict, str] = {
    "better": "Shown to be better than {}",
    "worse": "Shown to be worse than {}",
    "no difference shown": "No difference to {} shown at this budget",
    "no interval": "Not told apart from {}",
    "diverged": "Diverged in at least one run",
}


def answer(result: Result) -> list[str]:
    """The answer: what is shown, what the best gains and costs, at equal compute and time too, and
    what would make it another.
    """
    return [*shown(result), *best(result), *cautions(result)]


def conclusion(result: Result) -> str:
    """The answer in one paragraph."""
    return " ".join(answer(result))


def shown(result: Result) -> list[str]:
    """Which variants are shown to be better or worse than the baseline, and which are not."""
    baseline = label(result.setting.baseline)
    named = {
        verdict: [label(row.variant) for row in result.rows if row.verdict == verdict]
        for verdict in PHRASES
    }
    why = ", which diverged" if result.setting.seeds > 1 else ", for want of seeds"
    parts = [
        f"{PHRASES[verdict].format(baseline)}{why if verdict == 'no interval' else ''}: "
        f"{', '.join(names)}."
        for verdict, names in named.items()
        if names
    ]
    if len(named["better"]) > 1:
        parts[0] += f" They were compared with {baseline}, not with each other."
    return parts


def best(result: Result) -> list[str]:
    """What the variant with the lowest loss gains and costs beside the baseline."""
    setting, row = result.setting, result.rows[0]
    if row.diverged:
        return []
    name = label(row.variant)
    if row.variant == setting.baseline:
        return [f"Lowest held-out loss: {name}, which the others are compared with."]
    reference = next(row for row in result.rows if row.variant == setting.baseline)
    if row.difference is None or reference.diverged:
        return [f"Lowest held-out loss: {name}."]
    at_equal_parameters, *others = views(result)
    place = next(p for p in at_equal_parameters.places if p.variant == row.variant)
    budget = f"after {counted(setting.steps, 'step')} of {setting.tokens_per_step:,} tokens"
    gain = f"{_gain(place)} nats a token"
    found = {
        "better": f"{name} lowers the held-out loss by {gain}",
        "no difference shown": f"{name} has the lowest held-out loss, by {gain}, as chance can do",
        "no interval": f"{name} has the lowest held-out loss, by {gain}, without an interval",
    }[place.verdict]
    lines = [f"At equal parameters, {budget}, {found}; {_costs(result, row, reference)}."]
    return lines + [f"At equal {view.name} {_at_equal(view, row.variant)}." for view in others]


def cautions(result: Result) -> list[str]:
    """Where the search for the learning rate ended too soon."""
    edge = edge_words(rate_curves(result.grid))
    return [edge] if edge else []


def _gain(place: Place) -> str:
    """By how much the loss is lower: `0.049 [0.030, 0.068]`, or from one number to another."""
    assert place.differences is not None
    ends = [signed(-difference, "-") for difference in reversed(place.differences)]
    gain = " to ".join(dict.fromkeys(ends))
    if place.low is None or place.high is None:
        return gain
    return f"{gain} [{signed(-place.high, '-')}, {signed(-place.low, '-')}]"


def _at_equal(view: View, arm: str) -> str:
    place = next((place for place in view.places if place.variant == arm), None)
    if place is None:
        return f"nothing can be said of it: {view.silent[arm]}"
    if place.differences is None:
        return "nothing can be said for want of the baseline"
    words = {"better": "the gain is", "worse": "it is worse: a gain of"}
    return f"{words.get(place.verdict, 'no gain is shown:')} {_gain(place)}"


def left_out(view: View) -> list[str]:
    """Of which arms a view says nothing, and why."""
    reasons = dict.fromkeys(view.silent.values())
    named = {why: [label(arm) for arm in view.silent if view.silent[arm] == why] for why in reasons}
    return [f"Nothing can be said of {', '.join(names)}: {why}." for why, names in named.items()]


def _costs(result: Result, best: Row, reference: Row) -> str:
    """`a step takes 3% longer [1%, 5%] and 2% more memory`."""
    memory = _percent(best.memory / reference.memory, "more memory", "less memory", "equal memory")
    if not best.step_time or not reference.step_time:
        return f"a step takes {memory}, its time was not measured"
    time = _percent(best.step_time / reference.step_time, "longer", "less time", "equally long")
    return f"a step takes {time}{_time_interval(result, best.variant)} and {memory}"


def _percent(ratio: float, more: str, less: str, equal: str) -> str:
    percent = round(100 * (ratio - 1))
    return f"{abs(percent)}% {more if percent > 0 else less}" if percent else equal


def _time_interval(result: Result, arm: str) -> str:
    """The interval of a step's time over the baseline's, by the analysis of the logarithms."""
    logs = {}
    for each, runs in result.runs.items():
        times = [run["result"]["step_time"] for run in runs]
        if not all(times):
            return ""
        logs[each] = [math.log(time) for time in times]
    kinds = {each: kind(each) for each in logs}
    contrast = analyse(logs, result.setting.baseline, kinds).get(arm)
    if contrast is None:
        return ""
    low, high = (100 * math.expm1(bound) for bound in (contrast.low, contrast.high))
    return f" [{low:+.0f}%, {high:+.0f}%]"


SHARED: dict[ModelName, str] = {
    "decoder": "Only the feed-forward differs: for each seed all variants share the initial values "
    "of every other matrix, and the batches in their order.",
    "gated-conv": "Widths differ so that the sizes are equal. For each seed all variants share the "
    "embedding's initial values, and the batches in their order.",
    "moe": "Only the experts differ: for each seed all variants share the initial values of every "
    "other matrix, routers included, and the batches in their order.",
    "t5": "Encoder-decoder with span corruption: losses are nats a token of the target, sentinels "
    "and end included, so there are no bits per byte. Only the feed-forward differs: for each seed "
    "all variants share the initial values of every other matrix, the batches in their order, and "
    "what is cut out of them. What is cut out of the held-out part is the same for all seeds.",
}


EXCEPTIONS: dict[ModelName, str] = {
    "decoder": "; the last one of a branch counts the inputs of all branches that are added up",
    "gated-conv": "",
    "moe": "; the last one of a branch counts the inputs of all branches that are added up",
    "t5": ", but embeddings, queries and the relative bias as T5 draws them",
}
"""What does not start by its own number of inputs."""


PRECISION = {False: "float32 on the CPU", True: "bfloat16 autocast on a GPU"}


def _of_experts(setting: Setting) -> list[str]:
    """What a mixture is, and which of its sizes are equal."""
    if not setting.has_experts:
        return []
    return [
        f"Each layer has {counted(setting.experts, 'expert')}, and a token goes through "
        f"{setting.top_k}, which are together as large as the decoder's feed-forward. Active are "
        "the parameters without the experts that a token does not go through. All variants have as "
        "many experts and choices, so that their parameters and their active ones differ by the "
        "same fraction, from the rounding of an expert's width. To the loss in training "
        f"{setting.balance:g} times the balance loss of each layer is added; the losses shown, of "
        "the selection and the held-out part, are without it.",
    ]


def notes(result: Result) -> list[str]:
    """What one must know to read the table: how it was made, and what it does not say."""
    setting, data = result.setting, result.data
    rates = ", ".join(f"{rate:g}" for rate in setting.learning_rates)
    init = (
        "every matrix is drawn with a standard deviation of 1 / sqrt(fan_in)"
        + ("" if setting.config else EXCEPTIONS[setting.model])
        if setting.init == "fan_in"
        else f"every matrix is drawn with a standard deviation of {setting.init}"
    )
    gpus = {run["machine"]["gpu"] is not None for runs in result.runs.values() for run in runs}
    precision = " or ".join(PRECISION[on_gpu] for on_gpu in sorted(gpus))
    epochs = setting.steps * setting.tokens_per_step / data["training_tokens"]
    mismatches = [row.mismatch for row in result.rows]
    spread = max(mismatches) - min(mismatches)
    lines = [
        f"Data: {data['description']}. Tokens: {setting.tokenizer}. A run sees "
        f"{setting.steps * setting.tokens_per_step:,} tokens, {epochs:.3g} times the training "
        "part. Losses are measured on the held-out part, which nothing was chosen by.",
        f"Model: {setting.model}, d_model {setting.d_model}, "
        f"{counted(setting.layers, 'layer')}, context {setting.context}, "
        f"{setting.tokens_per_step:,} tokens a step, {counted(setting.steps, 'step')}; "
        f"{OPTIMIZERS[setting.optimizer]}, cosine schedule, {precision}. {SHARED[setting.model]}",
        *_of_experts(setting),
        f"Initialisation: {init}. It decides small comparisons; --init changes it.",
        f"Learning rate: the best of {rates} for each variant, by the loss of its first seed on a "
        "separate selection part."
        if setting.tuned
        else f"Learning rate: {rates} for every variant. It was not tuned: a variant that wants "
        "another rate is at a disadvantage. --lr several times tunes it.",
        f"Differences are means over {setting.seeds} seeds, with {CONFIDENCE:.0%} intervals that "
        "hold for all variants at once (Dunnett's); what is shown follows from them. How much "
        "differences vary is pooled over variants, gated and not gated ones apart; with one "
        "variant of a kind it is that of its own differences. The thick lines of the pictures are "
        "the intervals of one variant alone. 'smallest shown' is the smallest difference that "
        "would have been told from none. "
        "The same command with more --seeds keeps these runs and narrows the intervals."
        if setting.seeds > 1
        else "One seed has no interval: nothing here tells a difference from chance. The same "
        "command with more --seeds keeps these runs.",
        f"Parameters of the compared part differ by at most {spread:.2%} between variants."
        + (
            " THE SIZES ARE UNEQUAL, as --allow-mismatch asked: a larger variant has an advantage."
            if spread > LARGEST_MISMATCH
            else ""
        ),
        "MFLOP/token: forward and backward. ms/step: median on this machine. MB a step: weights, "
        "gradients, "
        + ("AdamW's moments, " if setting.optimizer == "adamw" else "")
        + "and what forward keeps for backward.",
        "At equal compute or time, each variant is read where it has cost as much as the whole run "
        "of the cheapest: compute by MFLOP/token, time by the median of a step. A costlier one is "
        "there before its end, and its learning rate had not yet decayed; with a run planned for "
        "so many steps its loss would lie between that of its curve there and that of its end. "
        "Differences and intervals reach over both. The error of the times is not in them.",
        "It holds for this data, size and budget; larger ones can order the variants differently.",
    ]
    diverged = sum(row.diverged for row in result.rows)
    if diverged:
        lines.append(f"Runs that diverged: {diverged}. They count, and their variants rank last.")
    return lines
