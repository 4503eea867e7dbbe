"""``python -m emo_kernels COMMAND``: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

PROGRAM = "emo-kernels"

# command -> what it does; its module is emo_kernels.cli.<command>
COMMANDS = {
    "info": "what is installed here, which backends work and why the others do not",
    "demo": "the main job: a photograph, then a training run, plain against accelerated",
    "explain": "which backend runs each block of a model, and why not another",
    "bench": "time whole models, plain against accelerated",
    "tune": "search launch parameters of the Triton kernels for this GPU",
    "profile": "where the time of a model goes, plain and accelerated",
    "check": "a 20-second self-test of every backend on this machine",
    "convert": "convert a checkpoint between .pth and .safetensors and between key layouts",
    "export": "write a model as ONNX",
    "train": "train a model on scikit-learn's digits or a folder of images",
}
# command -> what installs its optional libraries
INSTALL = {
    "demo": "'emo_kernels[demo]'",
    "train": "'emo_kernels[demo]'",
    "export": "onnx onnxscript onnxruntime",
}

OK, MISMATCH, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 numbers disagree, 2 bad input.

    Args:
        argv: the words after the program's name; ``None`` takes them from ``sys.argv``.

    Example:
        >>> main(["no-such-command"])
        2
    """
    parser = _parser()
    try:
        outer = parser.parse_args(argv)
        return _run(outer.command, outer.arguments)
    except SystemExit as stop:  # argparse: --help, --version or a wrong option
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left, as in `... | head`
        sys.stderr.close()
        return OK
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("emo_kernels"):
            raise
        return _fail(_missing_library(outer.command, error))
    except (ValueError, OSError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        expected = not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError)
        if outer.traceback or not (expected or "memory" in str(error)):
            raise
        return _fail(str(error))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fused kernels and the reference for EMO vision backbones.",
        epilog=f"commands:\n{listing}\n\n{PROGRAM} COMMAND --help tells a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from, for bug reports"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options")
    return parser


def _run(command: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(f"emo_kernels.cli.{command}")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(arguments))
    return status


def _missing_library(command: str, error: ModuleNotFoundError) -> str:
    library = str(error.name).split(".")[0]
    install = INSTALL.get(command, library)
    return f"{command} needs {library}, which is not installed: pip install {install}"


def _fail(message: str, status: int = BAD_INPUT) -> int:
    line = " ".join(message.split()) or "failed without a message; --traceback shows where"
    print(f"{PROGRAM}: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
