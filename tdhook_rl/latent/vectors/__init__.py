"""How directions are extracted: activations of states and what chance makes of them, tensors and facts as results.

Knows sites and states; not :class:`tdhook_rl.latent.SteeringVector`, which is made from what is found here.
"""
