//! Links between documents: files and headings that are there.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use super::pages;
use crate::support::repository;

/// A line without what stands between backticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect()
}

/// Where the links of a line lead.
fn targets(line: &str) -> Vec<String> {
    let line = without_code(line);
    let ends = line.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    ends.map(|(target, _)| target.split(' ').next().unwrap_or_default().to_owned()).collect()
}

/// Names of a page's headings, as they stand behind `#` in a link.
fn anchors(text: &str) -> BTreeSet<String> {
    let (_, prose) = pages::parts(text);
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut anchors = BTreeSet::new();
    for (_, line) in prose {
        let level = line.chars().take_while(|letter| *letter == '#').count();
        let Some(title) = line[level..].strip_prefix(' ').filter(|_| (1..=6).contains(&level))
        else {
            continue;
        };
        let slug = slug(title);
        let before = seen.entry(slug.clone()).or_default();
        anchors.insert(if *before == 0 { slug } else { format!("{slug}-{before}") });
        *before += 1;
    }
    anchors
}

fn slug(title: &str) -> String {
    // Of a link in a heading the words count.
    let mut words = String::new();
    let mut rest = title;
    while let Some((before, link)) = rest.split_once("](") {
        words.push_str(before);
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    words.push_str(rest);
    let kept = words.trim().chars().filter(|it| it.is_alphanumeric() || " -_".contains(*it));
    kept.map(|letter| if letter == ' ' { '-' } else { letter })
        .flat_map(char::to_lowercase)
        .collect()
}

/// What is wrong with a link of a page.
fn complaint(page: &Path, target: &str) -> Option<String> {
    let (path, anchor) = target.split_once('#').map_or((target, None), |(p, a)| (p, Some(a)));
    let file = match path {
        "" => page.to_owned(),
        path => page.parent().unwrap().join(path),
    };
    if !file.exists() {
        return Some(format!("there is no {path}"));
    }
    let anchor = anchor.filter(|_| file.extension().is_some_and(|ending| ending == "md"))?;
    let found = anchors(&pages::read(&file));
    (!found.contains(anchor)).then(|| format!("{path} has no heading #{anchor}, but {found:?}"))
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let (mut seen, mut wrong) = (0, Vec::new());
    let pages = pages::all().into_iter().chain(pages::below(&repository().join("ops"), "md"));
    for page in pages {
        let text = pages::read(&page);
        for (number, line) in pages::parts(&text).1 {
            for target in targets(line) {
                if target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                seen += 1;
                let complaint = complaint(&page, &target);
                wrong.extend(
                    complaint.map(|what| format!("{}:{number}: {what}", pages::name(&page))),
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen >= 80, "only {seen} links were found");
}

#[test]
fn links_and_headings_are_read_as_they_are_shown() {
    assert_eq!(
        targets("see [a](b.md#c), ![x](y.svg) and [`z`](w.md \"title\"), not `[q](r)`"),
        ["b.md#c", "y.svg", "w.md"]
    );
    let page =
        "# The `run`, a [link](x.md)!\n## Two words\n```sh\n# no heading\n```\n## Two words\n#no\n";
    let expected = ["the-run-a-link", "two-words", "two-words-1"];
    assert!(anchors(page).iter().eq(expected.iter()), "{:?}", anchors(page));
    assert_eq!(slug("[[stages.mixture]]"), "stagesmixture");
    let readme = repository().join("README.md");
    assert_eq!(complaint(&readme, "docs/spec.md#run"), None);
    assert!(complaint(&readme, "docs/spec.md#runs").is_some());
    assert!(complaint(&readme, "docs/nowhere.md").is_some());
}
