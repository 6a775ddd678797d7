//! The status as a view of the whole terminal, once a second, until `q` is pressed.

use std::time::Duration;

use anyhow::{Context, Result};
use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, Paragraph, Row, Sparkline, Table};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::view::{Source, View};
use super::{ordered, workers};
use crate::progress::time_of_day;
use crate::signals;

/// The terminal looks for keys so often.
const KEYS_EVERY: Duration = Duration::from_millis(100);

/// What is shown: the newest view, and why there is no newer one.
#[derive(Clone, Debug)]
struct Shown {
    view: View,
    trouble: Option<String>,
}

/// Shows the run until somebody has seen enough.
pub(super) async fn watch(mut source: Source, view: View) -> Result<()> {
    let (newest, shown) = watch::channel(Shown { view, trouble: None });
    let looks = tokio::spawn(async move {
        loop {
            sleep(source.every()).await;
            let looked = source.view().await;
            newest.send_modify(|shown| match looked {
                Ok(view) => *shown = Shown { view, trouble: None },
                // It may come back; what is known of it stays.
                Err(error) => shown.trouble = Some(format!("{error:#}")),
            });
            if let Source::Live { url, tls, .. } = &source
                && newest.borrow().trouble.is_some()
                && let Ok(again) = Source::live(url, tls).await
            {
                source = again;
            }
        }
    });
    let stop = signals::stop_on_signals("leaving")?;
    // The terminal's calls block.
    let drawn = tokio::task::spawn_blocking(move || {
        let mut terminal = ratatui::try_init().context("cannot take the terminal")?;
        let result = draw_until_enough(&mut terminal, &shown, &stop);
        ratatui::restore();
        result
    });
    let result = drawn.await.context("the view failed")?;
    looks.abort();
    result
}

fn draw_until_enough(
    terminal: &mut DefaultTerminal,
    shown: &watch::Receiver<Shown>,
    stop: &CancellationToken,
) -> Result<()> {
    while !stop.is_cancelled() {
        let newest = shown.borrow().clone();
        terminal.draw(|frame| draw(frame, &newest)).context("cannot draw on the terminal")?;
        if event::poll(KEYS_EVERY).context("cannot read keys")?
            && let Input::Key(key) = event::read().context("cannot read keys")?
        {
            let interrupted =
                key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if interrupted || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn draw(frame: &mut Frame, shown: &Shown) {
    let view = &shown.view;
    let rows = u16::try_from(view.workers.len()).unwrap_or(u16::MAX).saturating_add(3);
    let [head, progress, figures, losses, members, events, keys] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Length(5),
        Constraint::Length(7),
        Constraint::Max(rows.min(14)),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(title(shown), head);
    frame.render_widget(gauge(view), progress);
    frame.render_widget(Paragraph::new(numbers(view)), figures);
    draw_losses(frame, view, losses);
    draw_workers(frame, view, members);
    let lines: Vec<Line> = view.events.iter().map(event_line).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" events ")), events);
    frame.render_widget(
        Line::from("q: leave").style(Style::new().add_modifier(Modifier::DIM)),
        keys,
    );
}

fn title(shown: &Shown) -> Paragraph<'_> {
    let view = &shown.view;
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let phase = Style::new().fg(match view.phase.as_str() {
        "training" | "evaluating" | "finished" => Color::Green,
        "failed" => Color::Red,
        _ => Color::Yellow,
    });
    let first = Line::from(vec![
        Span::styled(view.run.clone(), bold),
        Span::raw("  "),
        Span::styled(view.phase.clone(), phase.add_modifier(Modifier::BOLD)),
        Span::raw(format!("  {}", view.reason)),
    ]);
    let second = match &shown.trouble {
        Some(trouble) if !view.is_over() => Line::from(Span::styled(
            format!("what follows is old: {trouble}"),
            Style::new().fg(Color::Red),
        )),
        _ => Line::default(),
    };
    Paragraph::new(vec![first, second])
}

fn gauge(view: &View) -> Gauge<'_> {
    let total = view.total_steps.unwrap_or(view.step).max(1);
    let share = (view.step as f64 / total as f64).clamp(0.0, 1.0);
    let label = match view.total_steps {
        Some(total) => format!("step {} of {total}", view.step),
        None => format!("step {}", view.step),
    };
    Gauge::default().ratio(share).label(label).gauge_style(Style::new().fg(Color::Blue))
}

fn numbers(view: &View) -> Vec<Line<'_>> {
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let listed = |values: &[f64]| {
        values.iter().map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(" ")
    };
    let goodput = view.goodput_share().map(|share| {
        let total: f64 = view.goodput.values().sum();
        let rest = view
            .goodput
            .iter()
            .filter(|(name, seconds)| *name != "productive" && **seconds / total >= 0.0005);
        let rest = rest.map(|(name, seconds)| format!("{name} {:.1} %", 100.0 * seconds / total));
        format!("{:.1} %  {}", 100.0 * share, rest.collect::<Vec<_>>().join("  "))
    });
    let rate = view.tokens_per_second.map(|rate| format!("{rate:.0}"));
    vec![
        Line::from(format!(
            "loss {}   loops {}   exits {}",
            or_none(view.loss.map(|loss| format!("{loss:.4}"))),
            listed(&view.loss_per_loop),
            listed(&view.exit_pdf),
        )),
        Line::from(format!(
            "tokens {}   per second {}   MFU {}",
            view.tokens,
            or_none(rate),
            or_none(view.mfu.map(|mfu| format!("{:.1} %", 100.0 * mfu))),
        )),
        Line::from(format!(
            "learning rate {}   gradient norm {}",
            or_none(view.learning_rate.map(|rate| format!("{rate:.3e}"))),
            or_none(view.grad_norm.map(|norm| format!("{norm:.3}"))),
        )),
        Line::from(format!(
            "coordinator {}   generation {}   checkpoint {}{}",
            view.incarnation,
            or_none(view.generation.map(|generation| generation.to_string())),
            or_none(view.checkpoint_step.map(|step| format!("of step {step}"))),
            view.saving_step.map(|step| format!(", writing {step}")).unwrap_or_default(),
        )),
        Line::from(format!("goodput {}", or_none(goodput))),
    ]
}

fn draw_losses(frame: &mut Frame, view: &View, area: Rect) {
    let finite = || view.losses.iter().copied().filter(|loss| loss.is_finite());
    let (low, high) = finite()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), it| (low.min(it), high.max(it)));
    let title = match low <= high {
        true => format!(" loss of the latest steps, {low:.3} to {high:.3} "),
        false => " loss of the latest steps ".to_owned(),
    };
    // Never nothing: a lowest loss is one, too.
    let height = |loss: f64| 1 + ((loss - low) / (high - low).max(1e-9) * 63.0) as u64;
    let bars: Vec<u64> = finite().map(height).collect();
    let skip = bars.len().saturating_sub(area.width.saturating_sub(2).into());
    let sparkline = Sparkline::default()
        .block(Block::bordered().title(title))
        .data(&bars[skip..])
        .style(Style::new().fg(Color::Cyan));
    frame.render_widget(sparkline, area);
}

fn draw_workers(frame: &mut Frame, view: &View, area: Rect) {
    let mut rows = workers(view).into_iter();
    let head = rows.next().unwrap_or_default();
    let body: Vec<Row> = rows
        .zip(ordered(view))
        .map(|(cells, worker)| {
            let slow = !worker.straggles_in.is_empty();
            Row::new(cells).style(if slow { Style::new().fg(Color::Yellow) } else { Style::new() })
        })
        .collect();
    let widths = [
        Constraint::Fill(3),
        Constraint::Fill(2),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(11),
    ];
    let count = view.workers.len();
    // Two lines of the frame, and the heads.
    let shown = usize::from(area.height.saturating_sub(3)).min(count);
    let more = if shown < count { format!(", {shown} of them shown") } else { String::new() };
    let table = Table::new(body, widths)
        .header(Row::new(head).style(Style::new().add_modifier(Modifier::BOLD)))
        .block(Block::bordered().title(format!(" workers: {count}{more} ")));
    frame.render_widget(table, area);
}

fn event_line(event: &super::view::Event) -> Line<'_> {
    let (sign, color) = match event.tone.as_str() {
        "good" => ("+ ", Color::Green),
        "bad" => ("! ", Color::Red),
        _ => ("  ", Color::Reset),
    };
    Line::from(vec![
        Span::raw(format!("{}  ", time_of_day(event.unix_ms))),
        Span::styled(sign, Style::new().fg(color)),
        Span::raw(event.text.clone()),
    ])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn drawn(shown: &Shown, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, shown)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_the_run_and_says_when_it_is_old() {
        let mut shown = Shown { view: super::super::tests::example(), trouble: None };
        let text = drawn(&shown, 120, 40);
        for words in [
            "shown  training  generation 3: 1 worker",
            "step 40 of 100",
            "loops 2.750 2.250",
            "goodput 75.0 %  recovering 25.0 %",
            "workers: 2",
            "a-much-longer-name",
            "! worker w1 lost",
            "2.500 to 3.000",
        ] {
            assert!(text.contains(words), "`{words}` is not in\n{text}");
        }
        shown.trouble = Some("nobody answers".into());
        assert!(drawn(&shown, 120, 40).contains("what follows is old: nobody answers"));
    }

    #[test]
    fn small_terminals_and_empty_runs_can_be_drawn() {
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            for view in [View::default(), super::super::tests::example()] {
                drawn(&Shown { view, trouble: Some("gone".into()) }, width, height);
            }
        }
    }
}
