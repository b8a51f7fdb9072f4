"""A weight version, from the trainer to the servers. See the modules in the order of its way.

1. `publish` (trainer): after an optimiser step all ranks gather the weights; rank 0 writes them to
   `<run>/broadcasts/step_<version>/model.safetensors`, whole or not at all. The last two versions are kept.
2. `follow` (orchestrator): sees a new folder, asks every server to load it (`POST /update_weights`), and asks every
   second which version each server has: one that was restarted, or that was busy, is asked again.
3. `fetch` (server): finds the version's folder, or downloads it from the run's asset endpoint. A server that is started
   again loads the newest version before it answers its first request.
4. `load` (server): checks that names and shapes are the model's, then swaps between two decoding steps. vLLM's side is
   `weights/vllm.py`: pause, load in every worker, reset the caches, set the version, resume.

Version `n` is the weights after step `n`; version 0 is what the run began with.
"""
