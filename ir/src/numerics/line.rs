//! Totals of a line of floats. Their order is part of the contract, and is one that vectors have.

/// Partial totals of a line: lanes of one, two or four vectors.
pub const PARTIAL_TOTALS: usize = 8;

/// The total of a line of numbers x₀, x₁, … by a function that is not associative, as sums of floats are not:
///
/// ```text
/// t_j = initial, then with x_j, x_{j+8}, x_{j+16}, … in this order         j = 0 … 7
/// total = (t_0·t_4 · t_2·t_6) · (t_1·t_5 · t_3·t_7)
/// ```
///
/// `take` takes a number into a partial total, `combine` (· above) makes one of two. Beside what vectors gain, the error of
/// a long sum is an eighth of what it is in a single row of additions (Higham, "The accuracy of floating point summation",
/// 1993).
pub fn total<T: Copy, X>(
    line: impl IntoIterator<Item = X>,
    initial: T,
    take: impl Fn(T, X) -> T,
    combine: impl Fn(T, T) -> T,
) -> T {
    let mut t = [initial; PARTIAL_TOTALS];
    for (i, x) in line.into_iter().enumerate() {
        let j = i % PARTIAL_TOTALS;
        t[j] = take(t[j], x);
    }
    let mut half = PARTIAL_TOTALS / 2;
    while half > 0 {
        for j in 0..half {
            t[j] = combine(t[j], t[j + half]);
        }
        half /= 2;
    }
    t[0]
}

#[cfg(test)]
mod tests {
    use super::total;

    fn sum(x: &[f32]) -> f32 {
        total(x, 0.0, |t, &x| t + x, |a, b| a + b)
    }

    #[test]
    fn halves_are_combined_as_the_equation_says() {
        let x: Vec<f32> = (0..11).map(|i| 0.1 + i as f32 * 1.7).collect();
        let t = |j: usize| x[j..].iter().step_by(8).fold(0.0, |t, x| t + x);
        let expected = ((t(0) + t(4)) + (t(2) + t(6))) + ((t(1) + t(5)) + (t(3) + t(7)));
        assert_eq!(sum(&x).to_bits(), expected.to_bits());
    }

    #[test]
    fn a_short_line_is_its_numbers_and_an_empty_one_the_initial_total() {
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum(&[2.5]), 2.5);
        assert_eq!(sum(&[-0.0]).to_bits(), 0);
    }

    #[test]
    fn a_long_sum_loses_less_than_one_row_of_additions() {
        let x = vec![0.1f32; 1 << 20];
        let exact = f64::from(0.1f32) * f64::from(1 << 20);
        let error = |sum: f32| (f64::from(sum) - exact).abs();
        assert!(error(sum(&x)) < error(x.iter().sum()) / 8.0);
    }
}
