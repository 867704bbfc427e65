"""Import the modules of the engine process in a fork server, before the engine's configuration is known.

Importing this module does the work. The modules are those that vLLM's engine core and CPU worker import in their
first seconds, TorchDynamo and Inductor included. None of them may start a thread, because threads do not survive a
fork.
"""

import importlib
import os

from slimserve.core.parent_death import die_with_parent

for _module in (
    "torch._dynamo.convert_frame",
    "torch._inductor.codegen.cpp",
    "torch._inductor.compile_fx",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
):
    importlib.import_module(_module)

# The fork server ends with the API server, and the engine with the fork server.
die_with_parent()
os.register_at_fork(after_in_child=die_with_parent)
