"""What is measured of networks, and how it is shown: the report with its figures and caveats, and the ablation."""
