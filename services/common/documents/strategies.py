"""The strategies by name: what each asks of a study, and which of the study's fields it reads (docs/strategies.md).

SCAFFOLD's control variates travel twice: their changes in masked lanes of their own, and the server's c inside the
model file, as one more tensor, so that the digest which binds a round's model binds c too (ADR 0017).

A field that the named strategy does not read must stay at its default: a study that seems to say more than is done
misleads the board that approves it. Not here: the steps themselves (aggregator/strategy.py, hospital_node/training.py).
"""

from dataclasses import dataclass

from services.common.documents.strict import refuse
from services.common.documents.study import EncodingSection, ServerSection, Study

CONTROL = "~control"
"""The tensor of c in a model file: d numbers behind the model's own, since its name is behind all others."""

HEADER_ROOM = 1 << 20  # of a model file


@dataclass(frozen=True)
class Strategy:
    """`title` as its paper writes it; `reads`: the fields of `server` beside rate and averaging; of what it steps."""

    title: str
    reads: tuple[str, ...] = ()
    of_gradients: bool = False


STRATEGIES = {
    "fedavg": Strategy("FedAvg"),
    "fedavgm": Strategy("FedAvgM", ("momentum",)),
    "fedadam": Strategy("FedAdam", ("momentum", "second_moment", "adaptivity")),
    "fedyogi": Strategy("FedYogi", ("momentum", "second_moment", "adaptivity")),
    "scaffold": Strategy("SCAFFOLD"),
    "sgd": Strategy("SGD of the global gradient", ("momentum",), of_gradients=True),
    "adam": Strategy(
        "Adam of the global gradient", ("momentum", "second_moment", "smallest_divisor"), of_gradients=True
    ),
}
_MAY_BE_READ = ("momentum", "second_moment", "smallest_divisor", "adaptivity")


def check_strategy(study: Study) -> None:
    """Refuse a strategy that the mechanism does not feed, and fields that it does not read: INVALID_DOCUMENT."""
    if has_control(study):
        _check_scaffold(study)
    server, mechanism = study.server, study.privacy.mechanism
    chosen, gradients = STRATEGIES[server.strategy], mechanism == "shared"
    if chosen.of_gradients is not gradients:
        sends = "sums of gradients" if gradients else "updates"
        *others, last = (name for name, one in STRATEGIES.items() if one.of_gradients is gradients)
        fitting = f"{', '.join(others)} or {last}"
        raise refuse(
            study.name, f"server.strategy is {server.strategy}, but {mechanism} sends {sends}: choose {fitting}"
        )
    for name in _MAY_BE_READ:
        if name not in chosen.reads and getattr(server, name) != ServerSection.model_fields[name].default:
            raise refuse(study.name, f"server.{name} is set, but {server.strategy} does not read it: remove it")
    for name in ("control_clip", "control_bound"):
        if not has_control(study) and getattr(study.encoding, name) != EncodingSection.model_fields[name].default:
            raise refuse(study.name, f"encoding.{name} is set, but {server.strategy} does not read it: remove it")
    if server.strategy == "fedavgm" and server.momentum == 0:
        raise refuse(study.name, "server.momentum is 0, and fedavgm without momentum is fedavg: set it, or say fedavg")
    _check_proximal(study)
    if server.averaging == "tail" and server.averaging_rounds > study.rounds:
        raise refuse(
            study.name,
            f"server.averaging_rounds is {server.averaging_rounds}, the study trains {study.rounds} rounds: lower it",
        )


def _check_proximal(study: Study) -> None:
    """The term's gradient is μ(w - w_t): it is zero at w_t, so it needs a second step."""
    privacy, training = study.privacy, study.training
    if not training.proximal:
        return
    if privacy.mechanism == "shared":
        raise refuse(
            study.name,
            "training.proximal pulls a hospital's own steps back to the global model, and under shared every gradient "
            "is taken at that model, where the pull is zero: remove it",
        )
    name = "privacy.steps_per_round" if privacy.mechanism == "local" else "training.local_steps"
    if (privacy.steps_per_round if privacy.mechanism == "local" else training.local_steps) == 1:
        raise refuse(
            study.name, f"training.proximal is zero at the first step, and {name} is 1: take more steps, or remove it"
        )


def _check_scaffold(study: Study) -> None:
    """Algorithm 1 as it is proven, and nothing that it does not have."""
    mechanism, training = study.privacy.mechanism, study.training
    if mechanism != "none":
        raise refuse(
            study.name,
            f"server.strategy scaffold sends control variates beside the updates, which the proof of {mechanism} does "
            "not cover: choose another strategy, or mechanism none in words",
        )
    if training.momentum or training.proximal:
        raise refuse(
            study.name,
            "training.momentum and training.proximal do not go with scaffold, whose own step is plain SGD: remove them",
        )
    if study.server.averaging != "none":
        raise refuse(
            study.name,
            "server.averaging does not go with scaffold, whose control variate belongs to the newest model: remove it",
        )
    if study.evaluation.gate_rounds and study.gate.largest_drop < 1:
        raise refuse(
            study.name,
            "gate.largest_drop below 1 may roll a model back, and the hospitals' control variates would stay: under "
            "scaffold set it to 1, or no gate_rounds",
        )


def has_control(study: Study) -> bool:
    """Whether control variates travel."""
    return study.server.strategy == "scaffold"


def model_numbers(study: Study) -> int:
    """Numbers in the largest model file of the study."""
    return study.model.parameters * (2 if has_control(study) else 1)


def most_model_bytes(study: Study) -> int:
    """What a model file of the study has at most: its numbers, and some safetensors header."""
    return 4 * model_numbers(study) + HEADER_ROOM


def strategy_in_words(study: Study) -> str:
    """One line for people: the strategy and every number that it reads."""
    server = study.server
    chosen = STRATEGIES[server.strategy]
    numbers = [f"{name.replace('_', ' ')} {getattr(server, name):g}" for name in ("learning_rate", *chosen.reads)]
    if server.averaging != "none":
        over = f"decay {server.averaging_decay:g}" if server.averaging == "ema" else f"{server.averaging_rounds} rounds"
        numbers.append(f"publishes an average ({server.averaging}, {over})")
    words = f"{chosen.title} ({', '.join(numbers)})"
    return words + (f"; FedProx at the hospitals (μ {study.training.proximal:g})" if study.training.proximal else "")
