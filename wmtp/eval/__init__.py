"""Evaluation: tasks, protocols that ask a model, samples, their judgement, estimators, results and their page.

A task builder is a plain function `builder(**config keys)`, named as `_component_` in a config: `mbpp_tasks`,
`humaneval_tasks`, `assertion_tasks`, `packaged_function_tasks`, `bigcodebench_tasks`, `live_code_bench`,
`code_contests`, `packaged_program_tasks`; a `*_protocol` says how a model is asked; `solutions`,
`packaged_function_programs` and `paired_programs` give programs of tasks.
"""

from wmtp.eval.assertion_tasks import (
    AssertionTask,
    assertion_tasks,
    humaneval_tasks,
    mbpp_tasks,
    packaged_function_tasks,
)
from wmtp.eval.bigcodebench import bigcodebench_tasks
from wmtp.eval.live_code_bench import live_code_bench
from wmtp.eval.protocols import (
    Protocol,
    Task,
    alphacode_protocol,
    bigcode_protocol,
    chat_protocol,
    docstring_protocol,
    humaneval_protocol,
    three_shot_protocol,
)
from wmtp.eval.stdio_tasks import StdioTask, code_contests, packaged_program_tasks
from wmtp.eval.task_programs import TaskProgram, packaged_function_programs, paired_programs, solutions
