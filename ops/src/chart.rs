//! Line charts as SVG files.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

/// A line of a chart.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// What stands beside other charts in a file.
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    pub(crate) lines: Vec<Line>,
}

/// Colours that people with any colour vision tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/// Lines of more points have no dots.
const DOTS: usize = 60;

/// Width and height of a chart.
const SIZE: (u32, u32) = (480, 360);

/// Draws charts beside each other into a new file, or over an old one.
pub(crate) fn draw(path: &Path, charts: &[Chart]) -> Result<()> {
    let size = (SIZE.0 * charts.len() as u32, SIZE.1);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, chart) in root.split_evenly((1, charts.len())).iter().zip(charts) {
            draw_one(area, chart)?;
        }
        root.present()?;
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn draw_one(area: &DrawingArea<SVGBackend<'_>, Shift>, chart: &Chart) -> Result<()> {
    let points = || chart.lines.iter().flat_map(|line| &line.points);
    let (x, y) = (range(points().map(|point| point.0)), range(points().map(|point| point.1)));
    let mut context = ChartBuilder::on(area)
        .caption(&chart.title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(x, y)?;
    context
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(chart.x)
        .y_desc(chart.y)
        .x_labels(8)
        .y_labels(8)
        .draw()?;
    for (line, colour) in chart.lines.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(2);
        context
            .draw_series(LineSeries::new(line.points.iter().copied(), style))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        if line.points.len() <= DOTS {
            let dots = line.points.iter().map(|point| Circle::new(*point, 3, colour.filled()));
            context.draw_series(dots)?;
        }
    }
    if chart.lines.len() > 1 {
        context
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperMiddle)
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    Ok(())
}

/// From the least to the greatest value, with some room.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let values = values.filter(|value| value.is_finite());
    let (least, greatest) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), value| (a.min(value), b.max(value)));
    if least > greatest {
        return 0.0..1.0;
    }
    let room = (greatest - least).max(1e-3 * greatest.abs()).max(1e-9) * 0.05;
    least - room..greatest + room
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_all_charts_and_survives_what_cannot_be_drawn() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("chart.svg");
        let line =
            |name: &str, points: &[(f64, f64)]| Line { name: name.into(), points: points.to_vec() };
        let chart = |title: &str, lines| Chart { title: title.into(), x: "loop", y: "loss", lines };
        let charts = [
            chart("one", vec![line("a", &[(1.0, 2.0), (2.0, 1.5)]), line("b", &[(1.0, 3.0)])]),
            chart("none", vec![]),
            chart("flat", vec![line("c", &[(1.0, 2.0), (2.0, 2.0)])]),
        ];
        draw(&path, &charts).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for part in ["<svg", "one", "none", "flat", "loss", ">\na\n<", "polyline", "</svg>"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(draw(&directory.path().join("none/chart.svg"), &charts).is_err());
    }
}
