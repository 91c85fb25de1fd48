"""The studies of docs/evidence.md, as scripts that run `lgd` and sum up what it leaves."""
