"""Every place where upstream (torchtitan, torch, datasets) is subclassed, replaced or configured without a public hook.

docs/architecture.md has the table: each seam, why there is no public hook, and the test that fails when upstream moves.
Private modules of upstream are imported where they are used, so that an unused seam cannot break an import.
"""
