//! As much of the shell's language as commands in documents take.

/// The commands of a text, each as its words, without redirections and assignments before them. What is
/// substituted (`$NAME`, `$(...)`) stays as it is written.
pub(super) fn commands(text: &str) -> Vec<Vec<String>> {
    let joined = text.replace("\\\n", " ");
    joined.lines().flat_map(of_line).collect()
}

fn of_line(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut letters = line.chars().peekable();
    let mut word: Option<String> = None;
    // The word that is being read is a file, not an argument.
    let mut is_redirected = false;
    let end_word =
        |word: &mut Option<String>, is_redirected: &mut bool, commands: &mut Vec<Vec<String>>| {
            if let Some(word) = word.take()
                && !std::mem::take(is_redirected)
            {
                commands.last_mut().unwrap().push(word);
            }
        };
    while let Some(letter) = letters.next() {
        match letter {
            '#' if word.is_none() => break,
            ' ' | '\t' => end_word(&mut word, &mut is_redirected, &mut commands),
            ';' | '|' | '&' => {
                end_word(&mut word, &mut is_redirected, &mut commands);
                commands.push(Vec::new());
            }
            '<' | '>' => {
                // The number of a file before it is no word.
                if word.as_ref().is_some_and(|word| word.chars().all(|it| it.is_ascii_digit())) {
                    word = None;
                }
                end_word(&mut word, &mut is_redirected, &mut commands);
                while letters.next_if(|next| matches!(next, '<' | '>' | '&' | '|')).is_some() {}
                is_redirected = true;
            }
            '\'' => {
                let word = word.get_or_insert_default();
                word.extend(letters.by_ref().take_while(|letter| *letter != '\''));
            }
            '"' => {
                let word = word.get_or_insert_default();
                while let Some(letter) = letters.next().filter(|letter| *letter != '"') {
                    match letter {
                        '\\' => word.extend(letters.next()),
                        '$' => substitution(&mut letters, word),
                        _ => word.push(letter),
                    }
                }
            }
            '\\' => word.get_or_insert_default().extend(letters.next()),
            '$' => substitution(&mut letters, word.get_or_insert_default()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    end_word(&mut word, &mut is_redirected, &mut commands);
    for command in &mut commands {
        let values = command.iter().take_while(|word| is_assignment(word)).count();
        command.drain(..values);
    }
    commands.retain(|command| !command.is_empty());
    commands
}

/// A `$` and what belongs to it, up to the end of its parentheses or braces.
fn substitution(letters: &mut std::iter::Peekable<std::str::Chars<'_>>, word: &mut String) {
    word.push('$');
    let (open, close) = match letters.peek() {
        Some('(') => ('(', ')'),
        Some('{') => ('{', '}'),
        _ => return,
    };
    let mut depth = 0;
    for letter in letters.by_ref() {
        word.push(letter);
        depth += i32::from(letter == open) - i32::from(letter == close);
        if depth == 0 {
            break;
        }
    }
}

/// `NAME=value`.
fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|it| it.is_ascii_alphanumeric() || it == '_')
    })
}

#[test]
fn commands_are_words_without_what_the_shell_does_around_them() {
    for (text, expected) in [
        ("looptrain train a.toml", vec![vec!["looptrain", "train", "a.toml"]]),
        ("A=1 B='x y' run a   # why\n", vec![vec!["run", "a"]]),
        (
            "run --to \\\n    there > out 2>> log.txt &\nwait",
            vec![vec!["run", "--to", "there"], vec!["wait"]],
        ),
        (
            "run a 2>&1 | grep -F 'a|b'; next",
            vec![vec!["run", "a"], vec!["grep", "-F", "a|b"], vec!["next"]],
        ),
        ("run --at=\"$(date -u +%F (x))\" b", vec![vec!["run", "--at=$(date -u +%F (x))", "b"]]),
        (
            "run \"${@:2}\" $HOME/x --set k=v",
            vec![vec!["run", "${@:2}", "$HOME/x", "--set", "k=v"]],
        ),
        ("x=1", vec![]),
        ("run \"a \\\" b\" c\\ d ''", vec![vec!["run", "a \" b", "c d", ""]]),
        ("run < in && other", vec![vec!["run"], vec!["other"]]),
    ] {
        assert_eq!(commands(text), expected, "{text}");
    }
}
