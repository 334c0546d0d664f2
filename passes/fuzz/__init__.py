"""Programs that compute attention in random spellings, to check the matcher and added rules.

`campaign.run` builds programs from a `Spec` (what is computed) and one spelling per slot (how it is
written). Equivalent spellings must be found with the facts of the spec; breaking ones refused.
"""
