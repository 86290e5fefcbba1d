"""The command `hf-dualmoe`, and the command lines of the scripts in training/.

In: words. Out: what a script does.

Calls: attacks, data, evaluation, hub, losses, models, trainer.
"""
