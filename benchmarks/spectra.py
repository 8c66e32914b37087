"""How many products do spectra take, and are the error bars worth what they say? Measured where everything is known.

Leading eigenvalues by Lanczos and by deflated power iteration (the method of PyHessian), each given the best stop that
it could have: the fewest products after which all are within 1e-6 of the largest. Traces, densities and
the coverage of intervals over many seeds. Counts, not times: any machine gives the same.

    python benchmarks/spectra.py --output benchmarks/spectra.json
    python benchmarks/spectra.py --quick          # does it run? (few seeds, numbers mean nothing)
"""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from record import ROOT, Target, environment, print_targets, save_record, target_records
from tangora.curvature.density import spectral_density
from tangora.curvature.eigenpairs import select
from tangora.curvature.lanczos import Krylov, lanczos_eigenpairs
from tangora.curvature.power import power_eigenpairs
from tangora.curvature.products import Products
from tangora.curvature.trace import TraceEstimate, frobenius_norm, hutch_plus_plus, hutchinson

sys.path.append(str(ROOT))

from tests.curvature.spectra import (
    Rotated,
    clustered,
    indefinite,
    neural_like,
    pooled,
    separated,
    smoothed_nodes,
    true_residuals,
    wasserstein,
)

ACCURACY, LEVEL = 1e-6, 0.95
SPECTRA: dict[str, Callable[[], Any]] = {
    "bulk and 25 outliers": lambda: separated(1000, 25),
    "clusters": lambda: clustered(1000),
    "negative part": lambda: indefinite(1000),
    "neural": neural_like,
}
MOST_POWER_PRODUCTS = 400_000


def error(operator: Rotated, pairs: Any, k: int) -> float:
    """Return the largest error of the k eigenvalues of largest magnitude, relative to the largest."""
    wanted = operator.values[select(operator.values, k, "magnitude")]
    return float((pairs.values - wanted).abs().max() / operator.values.abs().max())


def lanczos_products(operator: Rotated, k: int, seed: int) -> int:
    """Count the products that Lanczos needs."""
    for products in range(k, 2000):
        found = lanczos_eigenpairs(
            operator,
            k,
            which="magnitude",
            tol=0.0,
            max_products=products,
            seed=seed,
        )
        if error(operator, found, k) <= ACCURACY:
            return products
    raise AssertionError("Lanczos does not converge")


def power_products(operator: Rotated, k: int, seed: int) -> tuple[int, bool]:
    """Count the products that power iteration needs with the largest tolerance that is accurate enough.

    Returns:
        The number, and whether it was enough.
    """
    tol, found = 1e-2, None
    while tol > 1e-8:
        found = power_eigenpairs(
            operator,
            k,
            tol=tol,
            max_products=MOST_POWER_PRODUCTS,
            seed=seed,
        )
        if error(operator, found, k) <= ACCURACY:
            return found.products, True
        if not found.converged:
            break
        tol /= 2
    assert found is not None
    return found.products, False


def leading(k: int, quick: bool) -> dict[str, Any]:
    """Compare the methods on every spectrum."""
    results = {}
    for name, spectrum in SPECTRA.items():
        if quick and name != "neural":
            continue
        operator = Rotated(spectrum())
        lanczos = lanczos_products(operator, k, 0)
        power, enough = power_products(operator, k, 0)
        results[name] = {
            "lanczos": lanczos,
            "power": power,
            "power_converged": enough,
            "ratio": lanczos / power,
        }
        print(name, results[name], flush=True)
    return results


def outliers(dtype: torch.dtype, seeds: int) -> dict[str, Any]:
    """Find ten separated outliers, for several seeds, with the method's own stop."""
    results = {}
    for name, spectrum in {"bulk and 10 outliers": separated, "neural": neural_like}.items():
        operator = Rotated(spectrum(), dtype=dtype)
        counts, errors, kept = [], [], []
        for seed in range(seeds):
            found = lanczos_eigenpairs(operator, 10, tol=ACCURACY, seed=seed)
            residuals = true_residuals(operator, found)
            counts.append(lanczos_products(operator, 10, seed))
            errors.append(error(operator, found, 10))
            kept.append(bool((residuals <= found.residuals).all()))
        results[name] = {
            "products_to_accuracy": max(counts),
            "error_at_own_stop": max(errors),
            "bounds_that_hold": sum(kept) / seeds,
        }
        print(dtype, name, results[name], flush=True)
    return results


def traces(seeds: int) -> dict[str, Any]:
    """Measure the relative root mean square errors of traces and norms."""
    operator = Rotated(neural_like())
    truths = {
        hutchinson: float(operator.values.sum()),
        hutch_plus_plus: float(operator.values.sum()),
        frobenius_norm: float(operator.values.norm()),
    }
    results: dict[str, Any] = {}
    for method, truth in truths.items():
        for products in (15, 30, 60, 120):
            found = [method(operator, products=products, seed=seed).value for seed in range(seeds)]
            rms = math.sqrt(statistics.fmean((value / truth - 1) ** 2 for value in found))
            results.setdefault(method.__name__, {})[str(products)] = rms
    print(results, flush=True)
    return results


def densities(seeds: int) -> dict[str, Any]:
    """Measure the distance of densities from the true spectrum, over its range, raw and smoothed."""
    operator = Rotated(neural_like())
    extent = float(operator.values[0] - operator.values[-1])
    results = {}
    for probes, steps in ((1, 40), (4, 40), (16, 40), (10, 80)):
        distances: dict[str, list[float]] = {}
        for seed in range(max(2, seeds * 4 // max(probes, 4))):
            found = spectral_density(operator, probes=probes, steps=steps, seed=seed)
            widths = {"smoothed": None, "smoothed by range / steps": extent / steps}
            widths["smoothed by PyHessian's width"] = math.sqrt(1e-5 * max(1.0, extent))
            measures = {"raw": pooled(found)}
            measures |= {name: smoothed_nodes(found, width) for name, width in widths.items()}
            for name, measure in measures.items():
                distances.setdefault(name, []).append(wasserstein(*measure, operator.values) / extent)
        results[f"{probes} x {steps}"] = {
            name: {
                "median": statistics.median(values),
                "mean": statistics.fmean(values),
                "seeds": len(values),
            }
            for name, values in distances.items()
        }
    print(results, flush=True)
    return results


def coverage(repetitions: int) -> dict[str, Any]:
    """Count how often the 95 % intervals hold the true number."""
    operator = Rotated(neural_like(300))
    truths = {
        hutchinson: float(operator.values.sum()),
        hutch_plus_plus: float(operator.values.sum()),
        frobenius_norm: float(operator.values.norm()),
    }
    results: dict[str, float] = {}

    def count(name: str, truth: float, estimate: Callable[[int], TraceEstimate]) -> None:
        intervals = [estimate(seed).interval(LEVEL) for seed in range(repetitions)]
        results[name] = sum(low <= truth <= high for low, high in intervals) / repetitions

    for method, truth in truths.items():
        for products in (20, 60):

            def one(seed: int, method: Any = method, products: int = products) -> TraceEstimate:
                return method(operator, products=products, seed=seed)

            count(f"{method.__name__}, {products} products", truth, one)

    def mean_eigenvalue(seed: int) -> TraceEstimate:
        return spectral_density(operator, probes=8, steps=10, seed=seed).moment(1)

    count("density's mean, 8 probes", float(operator.values.mean()), mean_eigenvalue)
    print(results, flush=True)
    return results


def ghosts() -> dict[str, int]:
    """Take 120 float32 steps on eleven outliers, and count the Ritz values among them."""
    values = torch.cat([torch.arange(10, 21).double(), torch.linspace(0, 1, 489).double()])
    operator = Rotated(values, dtype=torch.float32)
    small = Krylov(Products(operator, 120), 120, torch.ones(operator.size)).tridiagonalize(120)
    off = torch.diag(small.off_diagonal, 1)
    ritz = torch.linalg.eigvalsh(torch.diag(small.diagonal) + off + off.mT)
    return {"steps": ritz.shape[0], "outliers": 11, "ritz_values_among_them": int((ritz > 5).sum())}


def targets(results: dict[str, Any]) -> list[Target]:
    """Hold the numbers against what the issue asks.

    Args:
        results: All of them.

    Returns:
        The targets.
    """
    found = [
        Target(f"top 20, {name}: Lanczos / power products", case["ratio"], 0.2)
        for name, case in results["top_20"].items()
    ]
    for dtype in ("float64", "float32"):
        for name, case in results["outliers"][dtype].items():
            found += [
                Target(f"top 10, {name}, {dtype}: products", case["products_to_accuracy"], 20),
                Target(f"top 10, {name}, {dtype}: error at own stop", case["error_at_own_stop"], ACCURACY),
                Target(f"top 10, {name}, {dtype}: bounds hold", case["bounds_that_hold"], 1.0, at_least=True),
            ]
    quadrature = results["densities"]["4 x 40"]
    found += [
        Target("Hutch++, 60 products: error", results["traces"]["hutch_plus_plus"]["60"], 0.005),
        Target("density, 4 x 40: median distance", quadrature["raw"]["median"], 3e-4),
        Target("density, 4 x 40: mean distance", quadrature["raw"]["mean"], 3e-4),
        Target(
            "density, 4 x 40: smoothed / raw", quadrature["smoothed"]["mean"] / quadrature["raw"]["mean"], 5.0
        ),
        Target(
            "float32 ghosts", results["ghosts"]["ritz_values_among_them"] - results["ghosts"]["outliers"], 0
        ),
    ]
    for name, share in results["coverage"].items():
        found += [
            Target(f"coverage, {name}", share, 0.90, at_least=True),
            Target(f"coverage, {name}", share, 0.98),
        ]
    return found


def main(
    quick: Annotated[bool, typer.Option(help="Few seeds, one spectrum.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, judge and record."""
    facts = environment()
    seeds, repetitions = (3, 20) if quick else (100, 1000)
    results = {
        "ghosts": ghosts(),
        "outliers": {
            "float64": outliers(torch.float64, min(seeds, 20)),
            "float32": outliers(torch.float32, min(seeds, 20)),
        },
        "traces": traces(seeds),
        "densities": densities(seeds),
        "coverage": coverage(repetitions),
        "top_20": leading(20, quick),
    }
    judged = targets(results)
    print_targets(judged, judged=not quick)
    if output is not None:
        settings = {"accuracy": ACCURACY, "level": LEVEL, "seeds": seeds, "repetitions": repetitions}
        record = {"benchmark": "spectra", "environment": facts, "settings": settings, "results": results}
        save_record(output, record | {"targets": target_records(judged)})


if __name__ == "__main__":
    typer.run(main)
