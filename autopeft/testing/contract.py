"""The laws that every method keeps, as tests to inherit."""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest

from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.backends.hf.saved import merge_adapter
from autopeft.methods import check_spec
from autopeft.methods.base import Method
from autopeft.methods.faults import find_faults
from autopeft.records import Bits, Scalar
from autopeft.testing.fresh_process import CannotLoad, describe_modules, load_logits, save_for_use
from autopeft.testing.memory import SAME_BYTES
from autopeft.testing.subject import (
    NUM_STEPS,
    PAUSE_AT,
    Case,
    Subject,
    Trained,
    compute_logits,
    registered,
    width_for,
)
from autopeft.testing.tiny_models import ARCHITECTURES, NUM_FULL_ROWS, ArchitectureName, pad_further, tiny_batch

SAME_LOGITS = 1e-4
"""Logits of the tiny models are about one; float32 arithmetic in another order moves them by 1e-6."""
SAME_LOGITS_QUANTIZED = 2e-3


@pytest.mark.filterwarnings("ignore")
class MethodContract:
    """Every law that autopeft holds its methods to, for a method of your own:

        from autopeft.testing import MethodContract
        from my_package import MY_METHOD

        class TestMyMethod(MethodContract):
            method = MY_METHOD

    pytest then builds it with its recipe on a tiny random BERT, Llama, T5 and ModernBERT, as far as `Method.models`
    claims them, trains it for ten steps on CPU and checks what the table of methods says of it. Nothing is downloaded;
    a method takes some seconds. A law that the method does not claim (`merges`, a bit width) is skipped, and so is a
    model that it refuses with a SpecError, provided that `Method.needs` says what it needs.

    What has no file in peft's format is saved by `autopeft.backends.hf.saved` and loaded by another process, which must
    be able to import the method: keep it in a module-level constant, or register it under the entry point group
    `autopeft.methods`.
    """

    method: ClassVar[Method]
    architectures: ClassVar[Sequence[ArchitectureName]] = tuple(ARCHITECTURES)
    """Narrow it where the method is for few models; `Method.models` is respected in any case."""

    @classmethod
    def cases(cls) -> list[Any]:
        """The test subjects, plain or as `pytest.param`: a `Case` each, or a list of them, of which the first that is
        not refused is taken. Override to hold many methods at once."""
        return [Case(cls.method, name, width_for(cls.method)) for name in claimed(cls.method, cls.architectures)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "subject" in metafunc.fixturenames:
            metafunc.parametrize("subject", self.cases(), indirect=True, ids=_name_case, scope="class")

    @pytest.fixture(scope="class")
    def subject(self, request: pytest.FixtureRequest) -> Iterator[Subject]:
        cases: list[Case] = request.param if isinstance(request.param, list) else [request.param]
        with registered(cases[0].method):
            refusals = []
            for case in cases:
                subject = Subject(case)
                refusal = subject.refusal()
                if refusal is None or not case.method.needs:
                    yield subject
                    subject.close()
                    return
                refusals.append(f"{subject} is refused: {refusal}")
            if len(cases) > 1:
                _break("A method must be trained by some model, but " + "\n".join(refusals))
            pytest.skip(refusals[0])

    def same_bytes(self, subject: Subject) -> float:
        """Share by which estimated bytes may differ from counted ones. Override where a library keeps on a CPU what
        PyTorch's fake tensors do not have."""
        return SAME_BYTES

    # --- the laws

    def test_its_row_is_sound(self, subject: Subject) -> None:
        """As every row must be to enter the table at all."""
        faults = find_faults(subject.method)
        if faults:
            _break(f"The row of '{subject.method.name}' must be sound, but {'; '.join(faults)}.")

    def test_it_builds_and_trains(self, subject: Subject) -> None:
        refusal = subject.refusal()
        if refusal is not None:
            _break(
                f"{subject} must build and train, because `models` claims this kind of model, but it is refused: "
                f"{refusal} Narrow `models`, or say in `needs` what the method asks of a model."
            )
        try:
            _ = subject.trained
        except Exception as exc:
            _break(f"{subject} must build and train for {NUM_STEPS} steps, but raises this:\n{_tail(exc)}")

    def test_its_parameters_are_counted_without_weights(self, subject: Subject) -> None:
        """A search filters by the count before it trains, and reports it as exact."""
        _trained(subject)
        try:
            cost = subject.cost()
        except Exception as exc:
            _break(
                f"The costs of {subject} must be known before it is trained. For that its builder is run on tensors of "
                "the meta device, and one training step on fake ones: neither may ask for a value (`.item()`, "
                f"`if tensor > 0`). But the cost model raises this:\n{_tail(exc)}"
            )
        built = subject.parameters()
        if cost.trainable_parameters != built.adapter:
            _break(
                f"{subject} must train as many parameters as the cost model counts without weights, but counts "
                f"{cost.trainable_parameters:,} and trains {built.adapter:,}, the task head apart. Shapes must follow "
                "from the model's and the settings alone, not from values or devices."
            )
        in_peft = subject.count_by_peft()
        if in_peft is not None and in_peft != built.adapter + built.head:
            _break(
                f"{subject} must train as many parameters as peft's `get_nb_trainable_parameters` tells, the task head "
                f"included, but trains {built.adapter + built.head:,} and peft tells {in_peft:,}. A parameter must "
                "stand once in the model and say by `requires_grad` whether it trains."
            )
        whole = sum(
            p.numel() for name in subject.base.head for p in subject.base.model.get_submodule(name).parameters()
        )
        if built.head != whole:
            _break(
                f"{subject} must train the whole task head, which has {whole:,} parameters in "
                f"{', '.join(subject.base.head)}, but trains {built.head:,} of them. The head is new: whatever of it "
                "stays frozen stays random. With peft, give `context.head` as `modules_to_save`."
            )

    @pytest.mark.parametrize("bits", [4, 8, 32])
    def test_its_memory_is_estimated_without_weights(self, subject: Subject, bits: Bits) -> None:
        """Configurations are refused by their estimate before they start."""
        if bits not in subject.method.bits:
            pytest.skip(f"'{subject.method.name}' does not claim a base of {bits} bits")
        _trained(subject)
        other = subject if bits == subject.case.bits else Subject(subject.case._replace(bits=bits))
        try:
            agreement = other.compare_memory()
        except Exception as exc:
            # Other laws say so: the one about counts, and the one about quantized bases.
            pytest.skip(f"{other} cannot be estimated or does not train: {exc}")
        finally:
            if other is not subject:
                other.close()
        same = self.same_bytes(subject)
        if agreement.worst > same:
            _break(
                f"{other} must hold as many bytes as are estimated without weights, within {same:.0%}, but a "
                f"training step holds {agreement.training_counted:,} and {agreement.training_estimated:,} are "
                f"estimated, a scoring pass {agreement.scoring_counted:,} and {agreement.scoring_estimated:,}. What a "
                "method keeps in plain dictionaries or makes on real tensors alone is not seen: keep it in buffers."
            )

    def test_it_starts_as_the_base_exactly_if_it_says_so(self, subject: Subject) -> None:
        starting = compute_logits(_untrained(subject))
        difference = float((starting - subject.base_logits()).abs().max())
        if subject.method.starts_as_base and not difference <= _tolerance(subject):
            _break(
                f"{subject} must have the base's logits before its first step, because `starts_as_base` is true, but "
                f"they differ by {difference:.2g}. Draw one of the factors as zero, or set `starts_as_base=False`."
            )
        if not subject.method.starts_as_base and difference <= _tolerance(subject):
            _break(
                f"{subject} has the base's logits before its first step (within {difference:.1g}), but "
                "`starts_as_base` is false. Set it to true: users choose by what the table says."
            )

    def test_ten_steps_lower_the_loss(self, subject: Subject) -> None:
        trained = _trained(subject)
        if not trained.loss_after < trained.loss_before:
            _break(
                f"{subject} must lower the loss of a fixed batch in {NUM_STEPS} steps with the head held still, at its "
                f"recipe's learning rate {subject.spec.learning_rate:g} or in the middle of its range, but at "
                f"{trained.learning_rate:g} it goes from {trained.loss_before:.4f} to {trained.loss_after:.4f}. Look "
                "for a detached path, a scale of zero, a wrong sign, or a range in which it diverges."
            )

    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self, subject: Subject) -> None:
        trained = _trained(subject)
        missed = sorted(trained.trainable - trained.reached)
        if missed:
            _break(
                f"{subject} must pass a gradient to every trainable parameter within {NUM_STEPS} steps, but none ever "
                f"reaches {_list(missed)}. Such a parameter is counted, kept in the optimizer and saved, and learns "
                "nothing: freeze it, or connect it to the output."
            )
        if trained.frozen_with_gradient:
            _break(
                f"{subject} must pass gradients to trainable parameters alone, but "
                f"{_list(trained.frozen_with_gradient)} has one. It costs memory that the estimate does not count, and "
                "may change the base."
            )

    def test_the_last_layers_alone_can_be_chosen(self, subject: Subject) -> None:
        if not subject.method.layer_choice:
            pytest.skip(f"'{subject.method.name}' claims no choice of layers")
        group = subject.spec.target_modules
        spec = dataclasses.replace(subject.spec, target_modules="last-1" if group is None else f"{group}:last-1")
        _untrained(subject)
        try:
            check_spec(spec)
            model = build_trial_model(subject.base, spec)
        except Exception as exc:
            _break(
                f"{subject} must build on the last layer alone (target_modules '{spec.target_modules}'), because "
                f"`layer_choice` is true, but raises this:\n{_tail(exc)}"
            )
        first = [name for name in trainable_parameters(model) if find_layer(name) == 0]
        if first:
            _break(
                f"{subject} must train nothing in the first of two layers with target_modules '{spec.target_modules}', "
                f"because `layer_choice` is true, but trains {_list(first)}. Place it by `context.targets`, `roles` "
                "and `norms`, which then hold the chosen layers alone."
            )

    def test_its_answers_do_not_depend_on_padding(self, subject: Subject) -> None:
        """A row is scored beside whichever rows are in its batch; nobody should get another answer for that."""
        if not subject.method.answers_alone:
            pytest.skip(f"'{subject.method.name}' does not claim to answer a row whatever is in its batch")
        trained = _trained(subject)
        difference = float((compute_logits(trained.model, pad_further(tiny_batch())) - trained.logits_BC).abs().max())
        if not difference <= _tolerance(subject):
            _break(
                f"{subject} must give a row the same logits however far its batch is padded, but they differ by "
                f"{difference:.2g} when it is padded further. Look for a mean over positions, or an answer read from "
                "the last position: the attention mask says what is padding."
            )

    def test_a_fresh_process_loads_what_was_saved(self, subject: Subject) -> None:
        """With plain peft or plain transformers where they can, else with `autopeft.backends.hf.saved`.

        On rows of one length: given a prompt's embeddings, plain transformers classifies from padding."""
        trained = _trained(subject)
        batch = {name: tensor[:NUM_FULL_ROWS] for name, tensor in tiny_batch().items()}
        with tempfile.TemporaryDirectory(prefix="autopeft-saved-") as folder:
            saved = save_for_use(trained.model, subject.base, subject.spec, Path(folder) / "saved")
            if subject.method.peft is not None and saved.loader == "autopeft":
                _break(f"{subject} is built by peft and must be saved by it, but its model is a {type(trained.model)}.")
            try:
                logits = load_logits(saved, subject.method, subject.base, subject.folder, batch)
            except CannotLoad as exc:
                _break(f"{subject} must be loaded by a fresh process with {saved.loader}, which fails: {exc}")
        difference = float((logits - compute_logits(trained.model, batch)).abs().max())
        if not difference <= _tolerance(subject):
            _break(
                f"{subject} must have the same logits after it was saved and loaded by a fresh process with "
                f"{saved.loader}, but they differ by {difference:.2g}. Saved are the trainable parameters; whatever "
                "else the method draws must follow from the trial's seed or a fixed one, and the head must be saved "
                "with it."
            )

    def test_merging_keeps_the_logits_and_leaves_a_plain_model(self, subject: Subject) -> None:
        if not subject.method.merges:
            pytest.skip(f"'{subject.method.name}' does not claim to merge")
        if subject.case.bits < 16:
            pytest.skip("What is merged into quantized weights is rounded to their width")
        trained = _trained(subject)
        try:
            # Merging writes into the weights, which here are the resident base's.
            merged = merge_adapter(copy.deepcopy(trained.model))
        except Exception as exc:
            _break(f"{subject} must merge into its base, because `merges` is true, but raises this:\n{_tail(exc)}")
        difference = float((compute_logits(merged) - trained.logits_BC).abs().max())
        if not difference <= SAME_LOGITS:
            _break(
                f"{subject} must have the same logits after merging, because `merges` is true, but they differ by "
                f"{difference:.2g}. Merge the whole update, its scale and biases included, or set `merges=False`."
            )
        expected, left = describe_modules(subject.base.model), describe_modules(merged)
        other = sorted(set(expected.items()) ^ set(left.items()))
        if other:
            _break(
                f"{subject} must be a plain transformers model after merging, because `merges` is true, but differs "
                f"from one in {_list([f'{name} ({what})' for name, what in other])}."
            )

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_quantized_base_trains_and_stays_as_it_was(self, subject: Subject, bits: Bits) -> None:
        if bits not in subject.method.bits:
            pytest.skip(f"'{subject.method.name}' does not claim a base of {bits} bits")
        _trained(subject)
        quantized = Subject(subject.case._replace(bits=bits))
        rule = quantized.refusal()
        if rule is not None and not quantized.is_refused_by_rule():
            _break(
                f"{quantized} must build and train, because `bits` claims the width, but it is refused: {rule} Take "
                "the width out of `bits`, or give the rule in `refuse`."
            )
        if rule is not None:
            pytest.skip(f"{quantized} is refused: {rule}")
        try:
            trained = quantized.trained
        except Exception as exc:
            _break(f"{quantized} must build and train, because `bits` claims the width, but raises this:\n{_tail(exc)}")
        missed = sorted(trained.trainable - trained.reached)
        if missed:
            _break(
                f"{quantized} must pass a gradient to every trainable parameter, but none ever reaches {_list(missed)}."
            )
        if not trained.loss_after < trained.loss_before:
            _break(
                f"{quantized} must lower the loss of a fixed batch in {NUM_STEPS} steps, the head held still, but it "
                f"goes from {trained.loss_before:.4f} to {trained.loss_after:.4f}."
            )
        quantized.remove()
        untouched = quantized.base_is_untouched()
        quantized.close()
        if not untouched:
            _break(f"{quantized} must leave its base as it was, but has changed it.")

    def test_a_resumed_trial_ends_to_the_bit_like_one_that_went_on(self, subject: Subject) -> None:
        """Every trial pauses at every rung; a search must decide the same whichever worker goes on with it."""
        _trained(subject)
        resumed = subject.resume()
        if resumed.differing:
            _break(
                f"{subject} must end to the bit as if it had never paused, when it is rebuilt at step {PAUSE_AT} from "
                f"its checkpoint, but {_list(resumed.differing)} differs. A checkpoint holds the trainable parameters, "
                "the optimizer, the random state and `stepping.state`: keep what training changes in one of them."
            )
        if not resumed.same_scores:
            _break(
                f"{subject} must score as if it had never paused, when it is rebuilt at step {PAUSE_AT} from its "
                "checkpoint, but does not, although the checkpoints at its end are equal. Something outside them has "
                "changed in training: a buffer, or a frozen parameter."
            )

    def test_its_base_is_untouched_once_it_is_gone(self, subject: Subject) -> None:
        _trained(subject)
        subject.remove()
        if not subject.base_is_untouched():
            _break(
                f"{subject} must leave the resident base as it was: parameters, buffers, flags, module types, hooks "
                "and configuration. But something of it has changed, which every later trial on this worker would see. "
                "If the method trains or rewrites base weights, say so in `writes_base`: it is then given its own."
            )


def claimed(method: Method, architectures: Sequence[ArchitectureName]) -> list[ArchitectureName]:
    """Those whose kind is among `Method.models`."""
    return [name for name in architectures if ARCHITECTURES[name].kind in method.models]


def choice_variants(method: Method) -> list[dict[str, Scalar]]:
    """Changes to the recipe: every other value of every setting that is a choice, one at a time."""
    return [
        {dimension.name: value}
        for dimension in method.dimensions
        if dimension.kind == "choice"
        for value in dimension.choices
        if value != method.recipe.settings[dimension.name]
    ]


def find_layer(name: str) -> int | None:
    """The number of the layer that a parameter is in, the first number in its name; None for one outside."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def _name_case(case: object) -> str | None:
    if isinstance(case, list):
        # Which model it will be is known only when it runs.
        return _name_case(case[0]._replace(architecture="any"))
    return case.name() if isinstance(case, Case) else None


def _untrained(subject: Subject) -> Any:
    try:
        return subject.build()
    except Exception as exc:
        pytest.skip(f"{subject} does not build: {exc}")


def _trained(subject: Subject) -> Trained:
    try:
        return subject.trained
    except Exception as exc:
        # One law says so already.
        pytest.skip(f"{subject} does not build and train: {exc}")


def _tolerance(subject: Subject) -> float:
    return SAME_LOGITS if subject.spec.bits >= 16 else SAME_LOGITS_QUANTIZED


def _list(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _tail(exc: Exception) -> str:
    """Where it was raised, torch's own frames left out: there are dozens, and none is the author's."""
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if "/torch/" not in frame.filename]
    return "".join([*traceback.format_list(frames[-6:]), *traceback.format_exception_only(exc)])


def _break(message: str) -> NoReturn:
    # The author of a method needs the sentence, not our stack.
    raise pytest.fail.Exception(message, pytrace=False) from None
