"""Writes jobset-v1alpha2.json beside this file from two packages of PyPI; README.md says which and how.

The types of JobSet come from kubeflow-trainer-api (models generated from JobSet's own OpenAPI document), those of
Kubernetes from kubernetes-validate (generated from the API server's). Both are made strict: unknown fields are errors.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
from pathlib import Path
from typing import Any

KUBERNETES = "v1.33.0"
SHARED = {
    "IoK8sApiBatchV1JobTemplateSpec": "io.k8s.api.batch.v1.JobTemplateSpec",
    "IoK8sApimachineryPkgApisMetaV1ObjectMeta": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
}
# Values that the models name in prose only.
ENUMS = {
    ("JobsetV1alpha2FailurePolicyRule", "action"): [
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
    ],
    ("JobsetV1alpha2FailurePolicy", "restartStrategy"): ["Recreate", "BlockingRecreate"],
    ("JobsetV1alpha2JobSet", "apiVersion"): ["jobset.x-k8s.io/v1alpha2"],
    ("JobsetV1alpha2JobSet", "kind"): ["JobSet"],
}


def without_prose(value: Any) -> Any:
    """The schema without descriptions, titles and defaults, which say nothing about validity."""
    if isinstance(value, list):
        return [without_prose(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        if name in ("properties", "$defs"):
            kept[name] = {key: without_prose(inner) for key, inner in item.items()}
        elif name not in ("description", "title", "default") and not name.startswith("x-kubernetes"):
            kept[name] = without_prose(item)
    return kept


def references(value: Any) -> set[str]:
    """Names of definitions that a schema refers to."""
    if isinstance(value, list):
        return set().union(*map(references, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
    return own.union(*(references(item) for item in value.values()))


def renamed(value: Any) -> Any:
    """The schema with every reference pointing into one file's `$defs`."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: f"#/$defs/{SHARED.get(item.rpartition('/')[2], item.rpartition('/')[2])}"
        if name == "$ref"
        else renamed(item)
        for name, item in value.items()
    }


def jobset_types() -> dict[str, Any]:
    """JobSet's own definitions, strict."""
    models = importlib.import_module("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")
    whole = models.JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    found = {name: schema for name, schema in whole.pop("$defs").items() if name.startswith("Jobset")}
    found["JobsetV1alpha2JobSet"] = whole
    for name, schema in found.items():
        schema["additionalProperties"] = False
        for (owner, field), values in ENUMS.items():
            if owner == name:
                schema["properties"][field] = {"enum": values}
    found["JobsetV1alpha2JobSet"]["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return found


def main() -> None:
    """Writes the file."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    kubernetes = json.loads((folder / "_definitions.json").read_text())["$defs"]
    definitions = jobset_types()
    waiting = set(SHARED.values())
    while waiting:
        name = waiting.pop()
        definitions[name] = kubernetes[name]
        waiting |= references(kubernetes[name]) - definitions.keys()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": "#/$defs/JobsetV1alpha2JobSet",
        "$defs": dict(sorted(definitions.items())),
    }
    text = json.dumps(without_prose(renamed(schema)), separators=(",", ":"), sort_keys=True)
    Path(__file__).with_name("jobset-v1alpha2.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
