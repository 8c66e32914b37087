"""Print the tables of docs/theory/ode_lora.md: ``python -m tests.reproductions.integrate.measure``."""

from reproductions.matrix_sensing.schemes import SCHEMES
from tangora.geometry.gauge import imbalance
from tests.reproductions.integrate import test_orders, test_robustness
from tests.reproductions.integrate.problems import slope


def main() -> None:
    print("| scheme | evaluations | order | drift from balance |\n|---|---|---|---|")
    for name, scheme in SCHEMES.items():
        sizes = test_orders.sizes(scheme.order)
        ends = [test_orders.matrix_at_end(name, h) for h in sizes]
        order = slope(sizes, [float((end - test_orders.reference()).norm()) for end in ends])
        drift = ""
        if scheme.kind == "factors" and scheme.evaluations:
            states = [test_orders.factors_at_end(name, "sylvester", h) for h in sizes]
            drift = f"{slope(sizes, [float(imbalance(*state).norm()) for state in states]):.2f}"
        print(f"| `{name}` | {scheme.evaluations} | {order:.2f} | {drift} |", flush=True)
    smallest = (1e-1, 1e-3, 1e-6, 1e-10)
    print("| scheme | " + " | ".join(f"{value:.0e}" for value in smallest) + " |\n|---|---|---|---|---|")
    for name in SCHEMES:
        if name != "implicit_midpoint":
            row = (f"{test_robustness.error(name, value):.1e}" for value in smallest)
            print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
