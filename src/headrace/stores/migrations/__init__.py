"""The tables' history. Each store has a branch of its own in `versions/`: its first revision has no predecessor and a branch label,
and `Database.migrate` upgrades to all heads. So two stores' revisions never conflict."""
