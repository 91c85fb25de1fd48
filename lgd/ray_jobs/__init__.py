"""Ray: a cluster joined or started, functions mapped over it, training launched on it; nothing else imports ray.

With 0 workers everything runs in this process, without Ray; under torchrun such a process joins torchrun's world.
"""
