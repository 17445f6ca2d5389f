"""Target `peft`: adapter_config.json, and beside it everything that it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from autopeft.errors import ExportError
from autopeft.methods import find_method
from autopeft.records import StudyRecord, TrialRecord, to_record


def export_to_peft(record: StudyRecord, trial: TrialRecord, model: str, out: Path) -> list[Path]:
    """Raises ExportError for methods that peft cannot express."""
    method = find_method(trial.spec.method)
    if method.peft is None:
        raise ExportError(
            f"Trial {trial.number} is {method.title}, which the target 'peft' cannot express. {method.why_not_peft}"
        )
    from autopeft.backends.hf.base_model import describe_base
    from autopeft.backends.hf.build import build_context, make_peft_config
    from autopeft.tasks.spec import parse_task

    task = parse_task(record.config.task, record.config.task_name)
    base = describe_base(model, num_labels=task.num_labels, bits=trial.spec.bits)
    config = make_peft_config(method.peft(trial.spec, build_context(base, trial.spec)))
    config.base_model_name_or_path = record.config.model
    try:
        out.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(out)
        _sort_names(out / "adapter_config.json")
        path = out / "training.yaml"
        path.write_text(_training_yaml(record, trial, task.labels), encoding="utf-8")
    except OSError as exc:
        raise ExportError(f"--out must be writable, but '{out}' is not: {exc.strerror}.") from exc
    return [out / "adapter_config.json", path]


def _sort_names(path: Path) -> None:
    """peft keeps module names in sets; the same configuration should give the same file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data = {k: sorted(v) if isinstance(v, list) and all(isinstance(i, str) for i in v) else v for k, v in data.items()}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _training_yaml(record: StudyRecord, trial: TrialRecord, labels: tuple[str, ...]) -> str:
    spec, config = trial.spec, record.config
    content = {
        "base_model": config.model,
        "task": {"name": config.task_name, "labels": list(labels), "scorer": config.scorer},
        "quantization": _quantization(spec.bits),
        "training": {
            "optimizer": "adamw",
            "learning_rate": spec.learning_rate,
            "schedule": spec.schedule,
            "warmup_ratio": spec.warmup_ratio,
            "weight_decay": spec.weight_decay,
            "max_grad_norm": 1.0,
            "batch_size": spec.batch_size,
            "max_steps": spec.max_steps,
            "precision": "bf16 autocast, float32 trainable weights" if config.device_kind == "cuda" else "float32",
            "seed": spec.seed,
        },
        "measured": {
            "search_validation_quality": trial.quality,
            "test_quality": trial.test_quality,
            "seeds": 1 + len(trial.confirmations),
            "cost": to_record(trial.cost),
        },
        "provenance": {"study": config.name, "study_uid": record.uid, "trial": trial.number}
        | to_record(record.provenance),
    }
    head = "# What adapter_config.json cannot hold. Steps are those of the search; scale them to your data.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _quantization(bits: int) -> dict[str, object] | None:
    if bits == 4:
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"load_in_8bit": True} if bits == 8 else None
