"""What the commands do: `subquad quickstart`, `train`, `prepare`, `table`, `bench` and `report`, and the files in scripts/."""
