"""Where the tests' files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests/helpers"
FIXTURES = ROOT / "tests/fixtures"
CHECKPOINTS = FIXTURES / "families"  # one small random checkpoint of every supported family
TRACES = ROOT.parent / "shared/data/traces"  # published routing of real models; tests that need it skip without it
DEEPSEEK = TRACES / "deepseek_v2_lite_tokens.npz"
