"""SmolLM2 rewritten exactly, saved, loaded, and answering a question; about a minute on two cores."""

import tempfile
from pathlib import Path

import subquad
from subquad.model_source import open_model
from subquad.text_generation import Sampling, generate_text, open_for_generation


def main() -> None:
    """Rewrite the demo model and generate from the saved artifact."""
    fast = subquad.rewrite(open_model("smollm2").module)
    print(f"{len(fast.report.applied)} sites rewritten, plan {fast.report.plan_hash}")
    with tempfile.TemporaryDirectory() as scratch:
        out = subquad.save(fast, Path(scratch) / "fast")
        answer = generate_text(open_for_generation(str(out)), "What is a rainbow?", Sampling(max_new_tokens=40))
    print(answer.text)
    print(f"{answer.tokens_per_second:.1f} tokens/s, uncompiled, under the {answer.engine} decoder")


if __name__ == "__main__":
    main()
