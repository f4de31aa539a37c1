"""The command line: parse, call one verb, write, return an exit code. A file a command.

Other folders import the names below, from here. Torch is imported when a verb runs.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render, rescue, report, generate, diagnose, vllm.
"""  # noqa: E501

from qwen_precision.cli.app import main

__all__ = ["main"]
