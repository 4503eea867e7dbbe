"""The command line: one module per command, each with ``add_arguments(parser)`` and ``run(args)``.

:mod:`emo_kernels.__main__` imports a command's module only when that command is asked for, so the
libraries a command needs are imported by that command alone.
"""
